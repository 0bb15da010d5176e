"""What the estimator counts is what is there, and what it says of the rest follows from what the modules do."""

from pathlib import Path

import diffusers
import pytest
import tiny_flux
import tiny_qwen
import tiny_unets
import tiny_wan
import torch
from full_size_configs import write_configs
from peft import LoraConfig
from PIL import Image
from tiny_models import tiny_sd3_pipeline
from tiny_painter import tiny_painter_backbone
from tiny_training import tiny_config, tiny_lora, tiny_trainer

from trl_flow.backbones import BACKBONES, get_backbone
from trl_flow.memory import Estimate, Plan, as_json, as_text, empty_pipeline, estimate, fetch_configs, fits, savings
from trl_flow.memory.dry_run import peak_bytes
from trl_flow.memory.estimate import _quantized_bytes
from trl_flow.rollout import Rollout


# One of each family that has a backbone
FAMILIES = {
    "StableDiffusion3Pipeline": tiny_sd3_pipeline,
    "StableDiffusionPipeline": tiny_unets.tiny_sd_pipeline,
    "StableDiffusionXLPipeline": tiny_unets.tiny_sdxl_pipeline,
    "FluxPipeline": tiny_flux.tiny_flux_pipeline,
    "FluxKontextPipeline": tiny_flux.tiny_kontext_pipeline,
    "Flux2KleinPipeline": tiny_flux.tiny_klein_pipeline,
    "QwenImagePipeline": tiny_qwen.tiny_qwen_image_pipeline,
    "QwenImageEditPipeline": lambda: tiny_qwen.tiny_qwen_edit_pipeline(diffusers.QwenImageEditPipeline),
    "QwenImageEditPlusPipeline": lambda: tiny_qwen.tiny_qwen_edit_pipeline(diffusers.QwenImageEditPlusPipeline),
    "ZImagePipeline": tiny_qwen.tiny_z_image_pipeline,
    "WanPipeline": tiny_wan.tiny_wan_experts_pipeline,
    "WanImageToVideoPipeline": tiny_wan.tiny_wan_i2v_pipeline,
}


def plan(lora: LoraConfig | None = "default", *, sharding="none", **fields) -> Plan:
    config = tiny_config("unused", **{"height": 32, "width": 32, "bf16": True} | fields)
    return Plan(config, tiny_lora() if lora == "default" else lora, sharding)


def bytes_of(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.parameters())


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A saved pipeline of each family, without its weights."""
    found = {}
    for name, make in FAMILIES.items():
        found[name] = tmp_path_factory.mktemp("models") / name
        make().save_pretrained(found[name])
        for path in found[name].rglob("*.safetensors"):
            path.unlink()
    return found


def test_every_backbone_is_among_the_families():
    assert FAMILIES.keys() == BACKBONES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_built_and_run_from_its_configs(name, folders):
    pipeline = FAMILIES[name]()
    found = estimate(folders[name], plan())
    modules = {key: part for key, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    assert found.parameters == {key: sum(p.numel() for p in part.parameters()) for key, part in modules.items()}
    # The VAE stays in float32, the others are loaded in bfloat16
    assert found.resident["vae weights"] == bytes_of(modules["vae"])
    assert all(size > 0 for size in found.phases.values())
    assert found.phases["updating"] > found.phases["sampling"]


@pytest.mark.parametrize("name", FAMILIES)
def test_conditions_have_the_shapes_that_encoding_gives(name, monkeypatch):
    tiny_qwen.smaller_input_images(monkeypatch)
    with tiny_flux.tiny_kontext_sizes():
        check_condition_shapes(name)


def check_condition_shapes(name):
    pipeline = FAMILIES[name]()
    backbone = get_backbone(pipeline, height=32, width=32, max_sequence_length=24)
    image = [Image.new("RGB", (32, 32))] if backbone.takes_image else []
    condition = backbone.encode_prompt("a cat", *image)
    shapes = {key: tuple(value.shape[1:]) for key, value in condition.items()}
    expected = {key: shape for key, (shape, _) in backbone.condition_shapes().items()}
    dtypes = {key: dtype for key, (_, dtype) in backbone.condition_shapes().items()}
    assert {key: value.dtype for key, value in condition.items()} == dtypes
    if name.startswith("QwenImageEdit"):
        # The template's tokens, which depend on the tokenizer, come on top of the prompt's
        for both in (shapes, expected):
            both["encoder_hidden_states"] = both["encoder_hidden_states"][1:]
            both.pop("encoder_hidden_states_mask")
    assert shapes == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        # As published with the models
        ("sd35-medium", {"transformer": 2_243_171_520, "text_encoder_3": 4_762_310_656, "vae": 83_819_683}),
        ("sd35-large", {"transformer": 8_056_627_520, "text_encoder": 123_650_304, "text_encoder_2": 694_659_840}),
        ("flux-dev", {"transformer": 11_901_408_320, "text_encoder": 123_060_480, "vae": 83_819_683}),
        ("wan21-1.3b", {"transformer": 1_418_996_800, "text_encoder": 5_680_910_336, "vae": 126_892_531}),
        ("wan21-14b", {"transformer": 14_288_491_584}),
        ("sd14", {"unet": 859_520_964, "text_encoder": 123_060_480, "vae": 83_653_863}),
    ],
)
def test_full_size_models_have_the_parameters_they_are_known_for(name, parts, tmp_path):
    pipeline = empty_pipeline(write_configs(name, tmp_path / name))
    modules = {part: m for part, m in pipeline.components.items() if isinstance(m, torch.nn.Module)}
    assert {part: sum(p.numel() for p in modules[part].parameters()) for part in parts} == parts
    assert all(p.is_meta for module in modules.values() for p in module.parameters())


# ---- Against a run ----


@pytest.mark.parametrize("lora", ["default", None], ids=["adapter", "all weights"])
def test_weights_gradients_and_optimizer_state_are_those_of_a_run(tmp_path, tiny_sd3_path, lora):
    trainer = tiny_trainer(tmp_path, pipeline=tiny_sd3_path, lora=lora, max_steps=1, optim="adamw_torch")
    gradients = []
    trainer.optimizer_cls_and_kwargs = None
    step = torch.optim.AdamW.step

    def noted(self, *args, **kwargs):
        gradients.append(
            sum(p.grad.nbytes for group in self.param_groups for p in group["params"] if p.grad is not None)
        )
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = noted
    try:
        trainer.train()
    finally:
        torch.optim.AdamW.step = step
    config = tiny_config(tmp_path, bf16=False, optim="adamw_torch")
    found = estimate(tiny_sd3_path, Plan(config, tiny_lora() if lora else None))
    states = trainer.optimizer.state.values()
    moments = sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))
    assert found.resident["optimizer state (adamw_torch)"] == moments
    assert found.resident["gradients"] == gradients[0]
    modules = trainer.pipeline.components
    for name in ("vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        assert found.resident[f"{name} weights"] == bytes_of(modules[name])
    whole = bytes_of(trainer.accelerator.unwrap_model(trainer.model))
    assert found.resident["transformer weights"] + found.resident.get("adapter weights", 0) == whole
    assert found.trained_parameters == sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    parts = [part for part in modules.values() if isinstance(part, torch.nn.Module)]
    assert found.resident["buffers"] == sum(b.nbytes for part in parts for b in part.buffers()) > 0


def test_stored_samples_are_those_of_a_run(tmp_path, tiny_sd3_path):
    fields = {"steps_per_generation": 2, "height": 16, "width": 16}
    trainer = tiny_trainer(tmp_path, pipeline=tiny_sd3_path, **fields)
    noise = torch.zeros(16, 4, 8, 8)
    steps = trainer.algorithm.plan(0).kept
    sampled = dict.fromkeys(("latents", "next_latents", "means"), noise[:, None].expand(-1, len(steps), -1, -1, -1))
    kept = trainer.algorithm.keep(Rollout(steps=steps, final=noise, **sampled))
    found = estimate(tiny_sd3_path, plan(**fields))
    assert found.resident["stored samples"] == sum(tensor.nbytes for tensor in kept.values()) + noise.nbytes


def test_a_family_of_ones_own_is_estimated_from_its_backbone():
    """Worked out by hand: a perceptron with 193 inputs, 16 hidden units and 192 outputs, all of which are trained."""
    backbone = tiny_painter_backbone()
    found = estimate(backbone, plan(None))
    weights = 193 * 16 + 16 + 16 * 192 + 192
    assert found.parameters == {"painter": weights} and found.trained_parameters == weights
    assert found.resident["painter weights"] == found.resident["gradients"] == 4 * weights
    # Of 8 images: 3 x 8 x 8 numbers for the noise, and for latents, next latents and mean of each of 3 steps
    assert found.resident["stored samples"] == 8 * (3 * 3 + 1) * 3 * 8 * 8 * 4
    # Decoded they are floats, and one byte for each pixel at the end
    assert found.phases["decoding"] >= 8 * 3 * 8 * 8 * 5
    assert found.phases["updating"] > found.phases["sampling"] > 0
    assert not backbone.model.inner.weight.is_meta and backbone.model.inner.weight.requires_grad
    adapter = estimate(backbone, plan())
    assert adapter.trained_parameters == 4 * (193 + 16 + 16 + 192)


def test_a_backbone_is_estimated_as_its_folder(tiny_sd3_path):
    backbone = get_backbone(tiny_sd3_pipeline(), height=32, width=32, max_sequence_length=16)
    assert estimate(backbone, plan(bf16=False)) == estimate(tiny_sd3_path, plan(bf16=False))


def saved_bytes(backbone, policy, batch: int) -> int:
    """What autograd keeps for the backward pass of a forward on the CPU, beside the weights."""
    own = {p.untyped_storage().data_ptr() for p in (*policy.parameters(), *policy.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    shapes = backbone.condition_shapes()
    condition = {name: torch.zeros(batch, *shape) for name, (shape, _) in shapes.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity = backbone.guided_prediction(
            policy, torch.zeros(batch, *backbone.latent_shape()), torch.tensor(500.0), condition
        )
    assert velocity.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("batch", [2, 8])
def test_activations_are_about_what_autograd_keeps(tmp_path, batch):
    """The bundled model: the peak is what is kept, and some more for what comes and goes."""
    from trl_flow.shapes import pipeline_path

    fields = {
        "height": 32,
        "width": 32,
        "max_sequence_length": 1,
        "guidance_scale": 1.0,
        "per_device_train_batch_size": batch,
        "num_generations": 2,
        "bf16": False,
    }
    trainer = tiny_trainer(tmp_path, pipeline=pipeline_path(), **fields)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    kept = saved_bytes(trainer.backbone, policy.train(), batch)
    found = estimate(pipeline_path(), Plan(tiny_config(tmp_path, **fields), tiny_lora()))
    print(f"batch {batch}: kept {kept:,} bytes, estimated peak {found.phases['updating']:,}")
    assert kept < found.phases["updating"] < 1.3 * kept


# ---- What changes what ----


def test_the_sum_is_the_total(tiny_sd3_path):
    found = estimate(tiny_sd3_path, plan(height=16, width=16))
    assert found.total == sum(found.resident.values()) + max(found.phases.values()) + found.allowance


def phases(folder, **fields) -> dict[str, int]:
    return estimate(folder, plan(**{"height": 16, "width": 16} | fields)).phases


def test_checkpointing_guidance_and_batches(tiny_sd3_path):
    base = phases(tiny_sd3_path)
    assert phases(tiny_sd3_path, gradient_checkpointing=True)["updating"] < 0.7 * base["updating"]
    unguided = phases(tiny_sd3_path, guidance_scale=1.0)
    assert 0.4 < unguided["updating"] / base["updating"] < 0.6
    larger = phases(tiny_sd3_path, per_device_train_batch_size=16)
    assert 1.8 < larger["updating"] / base["updating"] < 2.1


def test_slicing_and_tiling_of_the_vae(folders):
    whole = phases(folders["StableDiffusion3Pipeline"])["decoding"]
    sliced = phases(folders["StableDiffusion3Pipeline"], enable_vae_slicing=True)["decoding"]
    # One of eight images at once, and all finished ones twice, when they are put together
    assert whole / 8 < sliced < whole / 8 + 2 * (8 * 3 * 16 * 16 * 4)
    # Tiles are of the size that the VAE was trained on, 16 pixels here: smaller images are not cut
    assert phases(folders["StableDiffusion3Pipeline"], enable_vae_tiling=True)["decoding"] == whole


def test_text_encoders_that_are_off_the_device(tiny_sd3_path):
    on = estimate(tiny_sd3_path, plan(height=16, width=16))
    off = estimate(tiny_sd3_path, plan(height=16, width=16, precompute_prompt_embeds=True))
    encoders = {name for name in on.resident if name.startswith("text_encoder")}
    assert len(encoders) == 3 and not encoders & off.resident.keys()
    assert "encoding the prompts" in off.phases


def test_reference_average_and_dtypes(tiny_sd3_path):
    full = estimate(tiny_sd3_path, plan(None, height=16, width=16, beta=0.1, use_ema=True))
    weights = full.resident["transformer weights"]
    assert full.resident["reference model"] == weights
    assert full.resident["moving average"] == full.resident["gradients"] == 4 * full.trained_parameters
    half = estimate(tiny_sd3_path, plan(height=16, width=16))
    assert half.resident["text_encoder weights"] * 2 == pytest.approx(
        estimate(tiny_sd3_path, plan(height=16, width=16, model_init_kwargs={"dtype": "float32"})).resident[
            "text_encoder weights"
        ],
        rel=0.01,
    )


def of_processes(number: int, sharding: str, lora=None, **fields) -> Plan:
    one = plan(lora, height=16, width=16, **fields)
    cls = type(one.args)
    one.args.__class__ = type(cls.__name__, (cls,), {"world_size": property(lambda self: number)})
    return Plan(one.args, lora, sharding)


def test_sharding(tiny_sd3_path):
    whole = estimate(tiny_sd3_path, of_processes(4, "none")).resident
    gradients = estimate(tiny_sd3_path, of_processes(4, "gradients")).resident
    weights = estimate(tiny_sd3_path, of_processes(4, "weights")).resident
    optimizer = "optimizer state (adamw_torch_fused)"
    assert whole["buckets of DDP"] == whole["gradients"]
    assert gradients["gradients"] == whole["gradients"] // 4 == weights["gradients"]
    assert gradients[optimizer] == whole[optimizer] // 4 == weights[optimizer]
    assert gradients["transformer weights"] == whole["transformer weights"] == 4 * weights["transformer weights"]
    assert "buckets of DDP" not in gradients | weights


def test_quantised_weights_by_hand():
    model = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False), torch.nn.LayerNorm(64)).to(torch.bfloat16)
    norm = 2 * 64 * 2
    assert _quantized_bytes(model, {"load_in_8bit": True}) == 128 * 64 + 64 * 4 + norm
    assert _quantized_bytes(model, {"load_in_4bit": True}) == 128 * 64 // 2 + 128 * 4 + norm
    nested = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    assert _quantized_bytes(model, nested) == 128 * 64 // 2 + 128 + 4 + norm


def test_a_setting_without_effect_is_refused_as_in_training(folders):
    with pytest.raises(ValueError, match="negative_prompt is 'blurred', but Flux2KleinPipeline takes none"):
        estimate(str(folders["Flux2KleinPipeline"]), plan(negative_prompt="blurred"))


def test_savings_are_the_differences_of_estimates(tiny_sd3_path):
    start = plan(height=16, width=16, per_device_train_batch_size=64)
    now = estimate(tiny_sd3_path, start)
    assert all(saved > 0 for _, saved in savings(start, now, lambda other: estimate(tiny_sd3_path, other)))
    sliced = estimate(tiny_sd3_path, start.changed(enable_vae_slicing=True))
    direct = estimate(
        tiny_sd3_path, plan(height=16, width=16, per_device_train_batch_size=64, enable_vae_slicing=True)
    )
    assert sliced == direct


@pytest.mark.parametrize(
    ("batch", "groups", "advice", "times"),
    [(8, 4, 4, "twice"), (9, 3, 3, "3 times"), (7, 7, 1, "7 times"), (6, 2, 3, "twice")],
)
def test_the_advised_batch_is_accepted(batch, groups, advice, times):
    """The images of a phase and of an update stay as they are."""
    args = {"per_device_train_batch_size": batch, "num_generations": groups, "num_iterations": 3}
    start, asked = plan(**args), []

    def by_batch(other: Plan) -> Estimate:
        asked.append(other.args)
        return Estimate({}, 0, {}, {"sampling": 1000 * other.args.per_device_train_batch_size}, 0)

    text, saved = savings(start, by_batch(start), by_batch)[0]
    assert text == f"per_device_train_batch_size: {advice} (and {times} the steps_per_generation and accumulation)"
    assert saved == 1000 * (batch - advice)
    (other,) = (args for args in asked if args.per_device_train_batch_size == advice)
    assert other.generation_batch_size == start.args.generation_batch_size
    assert other.updates_per_generation == start.args.updates_per_generation


def test_what_is_refused_is_not_advised():
    def refuses_windows(other: Plan) -> Estimate:
        if other.args.sde_window_size is not None:
            raise ValueError("no window here")
        return Estimate({}, 0, {}, {"sampling": 1}, 0)

    found = savings(plan(), Estimate({}, 0, {}, {"sampling": 1000}, 0), refuses_windows)
    assert found and not any("window" in text for text, _ in found)


@pytest.mark.parametrize(("share", "verdict"), [(0.89, "fits"), (0.94, "tight, 94% of it"), (1.01, "does not fit")])
def test_a_card_that_would_be_nearly_full_is_tight(share, verdict):
    found = Estimate({}, 0, {}, {"updating": int(share * 24 * 2**30)}, 0)
    assert f"24 GB: {verdict}  40 GB: fits" in as_text(found, plan(), [])
    assert as_json(found, [])["fits"]["24"] is fits(found, 24) is (verdict == "fits")


@pytest.mark.parametrize(("tiled", "advised"), [(100, False), (50, True)])
def test_tiling_is_advised_only_where_it_saves_more_than_slicing(tiled, advised):
    """Decoding takes 600 bytes, one image at a time 100; images no larger than a tile are not cut any further."""

    def by_hand(other: Plan) -> Estimate:
        size = tiled if other.args.enable_vae_tiling else 100 if other.args.enable_vae_slicing else 600
        return Estimate({}, 0, {"transformer weights": 1000}, {"decoding": size}, 0)

    found = dict(savings(plan(), by_hand(plan()), by_hand))
    assert found["enable_vae_slicing: true"] == 500
    assert found.get("enable_vae_tiling: true, with slicing") == (550 if advised else None)


def test_the_peak_counts_what_lives_at_the_same_time():
    """1,000 and 500 floats live together, then 500 and 2,000."""

    def run(kernels):
        a = torch.empty(1000, device="meta")
        b = torch.empty(500, device="meta")
        view = b.view(5, 100)  # no memory of its own
        del a
        torch.empty(2000, device="meta")
        del view

    assert peak_bytes(run, [], None) == 4 * 2500


# ---- What is refused ----


def test_a_folder_that_is_no_pipeline(tmp_path):
    with pytest.raises(ValueError, match="has no model_index.json"):
        fetch_configs(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("vae/config.json", None, "vae/config.json cannot be read: .*No such file"),
        ("transformer/config.json", "{", "transformer/config.json cannot be read: Expecting"),
        ("transformer/config.json", "[]", "transformer/config.json cannot be read: it holds a list"),
        (
            "model_index.json",
            '{"_class_name": "KandinskyPipeline"}',
            "KandinskyPipeline is not supported. Supported pipelines: .*StableDiffusion3Pipeline",
        ),
        (
            "model_index.json",
            '{"_class_name": "StableDiffusion3Pipeline", "vae": ["diffusers", "AutoencoderFuture"]}',
            "AutoencoderFuture of diffusers, which the installed libraries do not have",
        ),
    ],
)
def test_unfit_configuration_files(tmp_path, file, content, words):
    folder = write_configs("sd35-medium", tmp_path / "model")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(ValueError, match=words):
        empty_pipeline(folder)


def test_a_hub_model_is_read_from_its_configuration_files_alone(hub_server, folders):
    folder = folders["StableDiffusion3Pipeline"]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub_server.private["tester/tiny"] = False
    hub_server.repos["tester/tiny"] = files | {"transformer/diffusion_pytorch_model.safetensors": b"not fetched"}
    assert estimate(fetch_configs("tester/tiny"), plan()) == estimate(folder, plan())
    fetched = {path for method, path in hub_server.requests if "/resolve/" in path}
    assert fetched and all(path.endswith(".json") for path in fetched)
    assert not any("tokenizer" in path for path in fetched)


def test_a_hub_model_that_is_not_there(hub_server):
    with pytest.raises(
        ValueError, match="'tester/none' is neither a folder nor .* could not be fetched .*Repository Not Found"
    ):
        fetch_configs("tester/none")


def test_without_a_network():
    with pytest.raises(ValueError, match="'user/model' .* could not be fetched .*give a folder that holds the files"):
        fetch_configs("user/model")


def test_a_name_that_cannot_be_one():
    with pytest.raises(ValueError, match="'no/such/folder' is neither a folder nor a hub id.*Repo id must be"):
        fetch_configs("no/such/folder")
