"""
Updates of a full-size transformer with random weights and a LoRA, by the trainer itself: time against the bare
transformer, peak memory against the estimate, and the noise floor of the ratio; in each precision, compiled and not.

    python benchmarks/full_size_update.py --model sd35-medium
    python benchmarks/full_size_update.py --model flux-dev --batch-size 1 --tokens 512 --precisions bfloat16

No weights are downloaded: the transformer is made from its published configuration. Beside it are a small VAE, random
numbers for embeddings of prompts, and a reward that costs nothing. Three phases of two updates are made, of which the
last is measured. Each precision, compiled and not, is one line of JSON; what fails, one with its error. `--model tiny`
and `tiny-flux` run on a CPU, where the peak is not measured and TF32 is float32.
"""

import argparse
import gc
import json
import tempfile
import time
import zlib

import torch
from datasets import Dataset
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

from trl_flow import FlowGRPOTrainer, GuardConfig
from trl_flow.backbones import FluxBackbone, StableDiffusion3Backbone
from trl_flow.memory import Plan, estimate
from trl_flow.trainer.progress import FlowProgressCallback


SD35 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}
# The configurations of the released models
MODELS = {
    "sd35-medium": SD35
    | {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": list(range(13)),
    },
    "sd35-large": SD35
    | {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
    },
    "flux-dev": {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    "tiny": SD35
    | {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "caption_projection_dim": 32,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 64,
    },
    "tiny-flux": {
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
}
VAE = {
    "block_out_channels": (32,) * 4,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "tf32": torch.float32}
MEASURED = 3  # the phase; in the first, the second and the fourth the noise floor is measured, by further forwards


def make_transformer(name: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """With random weights."""
    with torch.device(device):
        torch.set_default_dtype(dtype)
        model = (FluxTransformer2DModel if "flux" in name else SD3Transformer2DModel)(**MODELS[name])
        torch.set_default_dtype(torch.float32)
    return model.to(device)


def make_policy(name: str, device: str, checkpointing: bool) -> torch.nn.Module:
    """The transformer in bfloat16 with the papers' LoRA, whose weights are float32."""
    model = make_transformer(name, torch.bfloat16, device).requires_grad_(False)
    if checkpointing:
        model.enable_gradient_checkpointing()
    targets = (FluxBackbone if "flux" in name else StableDiffusion3Backbone).lora_target_modules
    policy = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules=list(targets)))
    cast_training_params(policy, dtype=torch.float32)
    return policy.train()


def make_inputs(name: str, batch: int, size: int, tokens: int, device: str) -> dict[str, torch.Tensor]:
    """Inputs of one forward; with guidance, which Stable Diffusion 3.5 has, twice the batch."""
    config = MODELS[name]
    half = {"device": device, "dtype": torch.bfloat16}
    if "flux" in name:
        length = (size // 16) ** 2
        return {
            "hidden_states": torch.zeros(batch, length, 64, **half),
            "encoder_hidden_states": torch.zeros(batch, tokens, config["joint_attention_dim"], **half),
            "pooled_projections": torch.zeros(batch, config["pooled_projection_dim"], **half),
            "timestep": torch.zeros(batch, **half),
            "guidance": torch.zeros(batch, **half),
            "txt_ids": torch.zeros(tokens, 3, **half),
            "img_ids": torch.zeros(length, 3, **half),
        }
    return {
        "hidden_states": torch.zeros(2 * batch, 16, size // 8, size // 8, **half),
        "encoder_hidden_states": torch.zeros(2 * batch, 77 + tokens, config["joint_attention_dim"], **half),
        "pooled_projections": torch.zeros(2 * batch, config["pooled_projection_dim"], **half),
        "timestep": torch.zeros(2 * batch, device=device),
    }


class RandomPrompts:
    """Of a backbone whose pipeline has no text encoders: embeddings are random numbers that follow from the prompt."""

    @property
    def token_limit(self) -> int:
        return self.max_sequence_length

    def prompt_tokens(self, prompts):
        return None

    def encode_prompt(self, prompt: str) -> dict[str, torch.Tensor]:
        generator, found = torch.Generator().manual_seed(zlib.crc32(prompt.encode())), {}
        for name, (shape, dtype) in self.condition_shapes().items():
            values = torch.randn(1, *shape, generator=generator) * (name != "text_ids")
            found[name] = values.to(self.device, dtype)
        return found


class SD3Backbone(RandomPrompts, StableDiffusion3Backbone):
    def condition_shapes(self):
        config, tokens = self.model.config, 77 + self.max_sequence_length
        return {
            "encoder_hidden_states": ((tokens, config.joint_attention_dim), self.dtype),
            "pooled_projections": ((config.pooled_projection_dim,), self.dtype),
        }


class OwnFluxBackbone(RandomPrompts, FluxBackbone): ...


def make_backbone(given: argparse.Namespace, dtype: torch.dtype, device: str):
    transformer, is_flux = make_transformer(given.model, dtype, device), "flux" in given.model
    with torch.device(device):
        vae = AutoencoderKL(**VAE)
    parts = {"transformer": transformer, "vae": vae, "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    if is_flux:
        names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        pipeline = FluxPipeline(**parts, **dict.fromkeys(names))
    else:
        names = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
        pipeline = StableDiffusion3Pipeline(**parts, **dict.fromkeys(names))
    size = {"height": given.size, "width": given.size, "max_sequence_length": given.tokens}
    return (OwnFluxBackbone if is_flux else SD3Backbone)(pipeline, **size)


def rising(prompts, images, **kwargs) -> list[float]:
    """A reward that costs nothing."""
    return [float(i % 4) for i in range(len(images))]


class Peak(TrainerCallback):
    """The most memory of the measured phase, in bytes; `None` on a CPU."""

    bytes = None

    def on_step_end(self, args, state, control, **kwargs):
        if not torch.cuda.is_available():
            return
        if state.global_step == 2 * (MEASURED - 1):
            torch.cuda.reset_peak_memory_stats()
        elif state.global_step == 2 * MEASURED:
            self.bytes = torch.cuda.max_memory_allocated()


def bare_seconds(trainer: FlowGRPOTrainer, given: argparse.Namespace) -> dict[str, float]:
    """The forwards and backwards of a phase by the same transformer with its adapter, uncompiled, and nothing else."""
    backbone, args, cuda = trainer.backbone, trainer.args, torch.cuda.is_available()
    condition = trainer.policy.condition(["a", "b"] * given.batch_size)
    part = slice(0, given.batch_size)
    told = {name: value[part] for name, value in condition.positive.items()}
    negative = condition.negative and {name: value[part] for name, value in condition.negative.items()}
    latents = torch.randn(given.batch_size, *backbone.latent_shape(), device=trainer.accelerator.device)
    seconds, steps = {}, backbone.schedule(args.num_inference_steps).timesteps
    number = args.gradient_accumulation_steps  # micro-batches of an update
    for name, timesteps in (("updating", steps[:-1]), ("sampling", steps)):
        for _ in range(2):  # the first warms up
            start = time.perf_counter()
            for timestep in [t for t in timesteps for _ in range(number)]:
                with torch.set_grad_enabled(name == "updating"), trainer.accelerator.autocast():
                    inputs = trainer.model, latents, timestep, told, negative, args.guidance_scale
                    prediction = backbone.guided_prediction(*inputs)
                if name == "updating":
                    prediction.square().mean().backward()
            trainer.model.zero_grad()
            if cuda:
                torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - start
    return seconds


def measure(given: argparse.Namespace, precision: str, compiled: bool, folder: str) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    backbone = make_backbone(given, DTYPES[precision], device)
    accumulated = 1 if given.batch_size > 1 else 2  # a group has at least two images
    images = given.batch_size * accumulated
    args = GuardConfig(
        output_dir=folder,
        max_steps=2 * MEASURED,
        per_device_train_batch_size=given.batch_size,
        gradient_accumulation_steps=accumulated,
        steps_per_generation=accumulated,
        num_iterations=2,
        num_generations=images,
        num_inference_steps=given.steps,
        eval_num_inference_steps=given.steps,
        guidance_scale=1.0 if given.no_guidance else GuardConfig.guidance_scale,
        height=given.size,
        width=given.size,
        max_sequence_length=given.tokens,
        gradient_checkpointing=given.checkpointing,
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        tf32=True if precision == "tf32" and device == "cuda" else None,
        ratio_probe=0,
        torch_compile=compiled,
        torch_compile_backend=given.backend if compiled else None,
        attention_backend=given.attention_backend,
        logging_steps=1,
        log_images=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
    )
    lora = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian")
    found = estimate(backbone, Plan(args, lora))
    dataset, peak = Dataset.from_dict({"prompt": ["a", "b"]}), Peak()
    options = {"callbacks": [peak], "peft_config": lora, "backbone": backbone}
    trainer = FlowGRPOTrainer(backbone.pipeline, rising, args, dataset, **options)
    trainer.remove_callback(FlowProgressCallback)
    trainer.accelerator.print = lambda *args: None  # stdout is for the results alone
    trainer.train()
    logs = {log["step"]: log for log in trainer.state.log_history if "step_time" in log}
    bare = bare_seconds(trainer, given)
    sampled, second = logs[2 * MEASURED - 1], logs[2 * MEASURED]
    updating, sampling = second["time/updating"], sampled["time/sampling"]
    return {
        "update_s": updating,
        "update_ratio": updating / bare["updating"],
        "sampling_s": sampling,
        "sampling_ratio": sampling / bare["sampling"],
        "compile_s": sum(log.get("time/compiling", 0.0) for log in logs.values()),
        "peak_bytes": peak.bytes,
        "estimated_bytes": found.total - found.allowance,
        "first_update_deviation": logs[1]["ratio/first_update_deviation"],
        "noise_floor": logs[2].get("ratio/noise_floor"),
        "clip_range": trainer.algorithm.epsilon_low,
        "trained_parameters": found.trained_parameters,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd35-medium")
    parser.add_argument("--precisions", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--compiled", choices=("both", "yes", "no"), default="both")
    parser.add_argument("--backend", default="inductor", help="torch_compile_backend")
    parser.add_argument("--attention-backend", help="one of diffusers'")
    parser.add_argument("--batch-size", type=int, default=8, help="images in the update")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--tokens", type=int, default=128, help="max_sequence_length")
    parser.add_argument("--steps", type=int, default=4, help="sampling steps, all but the last trained")
    parser.add_argument("--no-guidance", action="store_true")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    given = parser.parse_args()
    if not torch.cuda.is_available() and not given.model.startswith("tiny"):
        parser.error("a full-size model needs a GPU, and torch sees none here; --model tiny runs without")
    about = {"model": given.model, "batch_size": given.batch_size, "size": given.size, "tokens": given.tokens}
    about |= {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}
    about |= {"gradient_checkpointing": given.checkpointing, "torch": torch.__version__}
    for precision in given.precisions:
        for compiled in {"both": (False, True), "yes": (True,), "no": (False,)}[given.compiled]:
            line = about | {"precision": precision, "compiled": compiled}
            with tempfile.TemporaryDirectory() as folder:
                try:
                    line |= measure(given, precision, compiled, folder)
                except Exception as error:  # the others are still of use
                    line["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            print(json.dumps(line), flush=True)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
