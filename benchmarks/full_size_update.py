"""
One update of a full-size transformer with random weights and a LoRA in bfloat16: time, peak memory and the estimate.

    python benchmarks/full_size_update.py --model sd35-medium
    python benchmarks/full_size_update.py --model flux-dev --batch-size 1

No weights are downloaded: the transformer is made from its published configuration. It is alone, without VAE, text
encoders and rewards, and the estimate is for that. The last line is JSON. `--model tiny` runs on a CPU, where the peak
is not measured.
"""

import argparse
import json
import time

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model

from trl_flow.backbones import FluxBackbone, StableDiffusion3Backbone
from trl_flow.memory.dry_run import checkpoint, peak_bytes


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
}


def make_policy(name: str, device: str, checkpointing: bool) -> torch.nn.Module:
    """The transformer in bfloat16 with the papers' LoRA, whose weights are float32."""
    is_flux = name.startswith("flux")
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        model = (FluxTransformer2DModel if is_flux else SD3Transformer2DModel)(**MODELS[name])
        torch.set_default_dtype(torch.float32)
    model.to(device).requires_grad_(False)
    if checkpointing and device == "meta":
        model.enable_gradient_checkpointing(lambda module, *args: checkpoint(module, *args, half=torch.bfloat16))
    elif checkpointing:
        model.enable_gradient_checkpointing()
    targets = (FluxBackbone if is_flux else StableDiffusion3Backbone).lora_target_modules
    policy = get_peft_model(model, LoraConfig(r=32, lora_alpha=64, target_modules=list(targets)))
    cast_training_params(policy, dtype=torch.float32)
    return policy.train()


def make_inputs(name: str, batch: int, size: int, tokens: int, device: str) -> dict[str, torch.Tensor]:
    """Inputs of one forward; with guidance, which Stable Diffusion 3.5 has, twice the batch."""
    config = MODELS[name]
    half = {"device": device, "dtype": torch.bfloat16}
    if name.startswith("flux"):
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


def estimated_bytes(arguments: argparse.Namespace) -> int:
    """Weights, adapter, gradients and optimizer state as they are counted, and the dry run's peak."""
    policy = make_policy(arguments.model, "meta", arguments.checkpointing)
    trained = [p for p in policy.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)

    def run(kernels) -> None:
        inputs = make_inputs(arguments.model, arguments.batch_size, arguments.size, arguments.tokens, "meta")
        output = policy(**inputs, return_dict=False)[0]
        kernels.forget()
        output.float().square().mean().backward()

    peak = peak_bytes(run, [policy], torch.bfloat16)
    weights = sum(tensor.nbytes for tensor in (*policy.parameters(), *policy.buffers()))
    return weights + 3 * sum(p.nbytes for p in trained) + peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="sd35-medium")
    parser.add_argument("--batch-size", type=int, default=8, help="images in the update")
    parser.add_argument("--size", type=int, default=512, help="height and width in pixels")
    parser.add_argument("--tokens", type=int, default=128, help="max_sequence_length")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and arguments.model != "tiny":
        parser.error("a full-size model needs a GPU, and torch sees none here; --model tiny runs without")

    policy = make_policy(arguments.model, device, arguments.checkpointing)
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    inputs = make_inputs(arguments.model, arguments.batch_size, arguments.size, arguments.tokens, device)
    times = []
    for _ in range(arguments.repeats + 1):  # the first warms up
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            output = policy(**inputs, return_dict=False)[0]
        output.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    result = {
        "model": arguments.model,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "batch_size": arguments.batch_size,
        "size": arguments.size,
        "tokens": arguments.tokens,
        "gradient_checkpointing": arguments.checkpointing,
        "parameters": sum(p.numel() for p in policy.parameters()) - sum(p.numel() for p in trained),
        "trained_parameters": sum(p.numel() for p in trained),
        "update_s": min(times[1:]),
        "peak_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "estimated_bytes": estimated_bytes(arguments),
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
