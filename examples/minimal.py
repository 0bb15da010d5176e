"""
Flow-GRPO (https://huggingface.co/papers/2505.05470) from top to bottom, without a trainer: prompts, rollout, reward,
advantages, loss, update.

Of this package it takes the equations (`trl_flow.functional`), and the small model and prompts that come with it; all
else is torch, diffusers and PEFT. In about a minute on one core the model learns to draw everything in red:

    python examples/minimal.py
"""

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from trl_flow.functional import clipped_loss, flow_sde_transition, group_advantages, log_ratio, ode_transition
from trl_flow.shapes import load_prompts, pipeline_path


STEPS = 6  # of sampling; the last, which ends at no noise, is not trained
PROMPTS, GROUP = 4, 12  # in a sampling phase, and images of each
UPDATES = 2  # on the images of a phase
NOISE_LEVEL = 0.7
EPSILON = 8e-4  # clip range of the ratio
LEARNING_RATE = 2e-3


def load() -> StableDiffusion3Pipeline:
    """The pipeline, with an adapter on its transformer: all that is trained."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(pipeline_path())
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    pipeline.transformer.add_adapter(LoraConfig(r=16, lora_alpha=32, target_modules=layers))
    pipeline.transformer.eval()  # no dropout: before an update the ratio must be 1
    pipeline.scheduler.set_timesteps(STEPS)
    return pipeline


# ---- Prompts ----


@torch.no_grad()
def encode(pipeline, prompts: list[str], images_per_prompt: int) -> dict[str, torch.Tensor]:
    """What the transformer is told, for each image; those of one prompt are next to each other."""
    options = {"num_images_per_prompt": images_per_prompt, "do_classifier_free_guidance": False}
    embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, **options, max_sequence_length=1)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


# ---- Rollout ----


def transition(pipeline, latents, step, condition):
    """The Gaussian of the next latents: mean and standard deviation."""
    sigmas, timestep = pipeline.scheduler.sigmas, pipeline.scheduler.timesteps[step].expand(len(latents))
    velocity = pipeline.transformer(latents, timestep=timestep, **condition).sample
    path = velocity, latents, sigmas[step], sigmas[step + 1]
    if step == STEPS - 1:
        return ode_transition(*path)
    return flow_sde_transition(*path, noise_level=NOISE_LEVEL, sigma_max=sigmas[1])


@torch.no_grad()
def sample(pipeline, condition):
    """Images, and of each trained step the latents, the next latents and the mean that these were drawn around."""
    size, batch = pipeline.transformer.config.sample_size, len(condition["pooled_projections"])
    latents = torch.randn(batch, pipeline.transformer.config.in_channels, size, size)
    visited = []
    for step in range(STEPS):
        mean, std = transition(pipeline, latents, step, condition)
        next_latents = mean + std.view(-1, 1, 1, 1) * torch.randn_like(mean)
        visited.append((latents, next_latents, mean))
        latents = next_latents
    vae = pipeline.vae.config
    decoded = pipeline.vae.decode(latents / vae.scaling_factor + vae.shift_factor).sample
    return pipeline.image_processor.postprocess(decoded), visited[:-1]


# ---- Reward ----


def red(image) -> float:
    """How much more red there is than of any other color, from -1 to 1."""
    r, g, b = np.moveaxis(np.asarray(image, dtype=np.float32) / 255, 2, 0)
    return float((r - np.maximum(g, b)).mean())


# ---- Loss and update ----


def update(pipeline, optimizer, visited, advantages, condition) -> None:
    """One step of the optimizer on all trained steps of all images."""
    for step, (latents, next_latents, old_mean) in enumerate(visited):
        mean, std = transition(pipeline, latents, step, condition)
        ratio = log_ratio(next_latents, mean, old_mean, std, kind="standard")
        (clipped_loss(ratio, advantages, epsilon=EPSILON).mean() / len(visited)).backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()


def train(phases: int) -> list[float]:
    """The mean reward of each sampling phase."""
    pipeline, prompts, history = load(), load_prompts("train")["prompt"][:], []
    optimizer = torch.optim.AdamW((p for p in pipeline.transformer.parameters() if p.requires_grad), lr=LEARNING_RATE)
    for phase in range(phases):
        chosen = [prompts[i] for i in torch.randperm(len(prompts))[:PROMPTS]]
        condition = encode(pipeline, chosen, GROUP)
        images, visited = sample(pipeline, condition)
        rewards = torch.tensor([red(image) for image in images])
        advantages = group_advantages(rewards, GROUP, scale_rewards="batch")
        for _ in range(UPDATES):  # in the first one every ratio is 1
            update(pipeline, optimizer, visited, advantages, condition)
        history.append(rewards.mean().item())
        print(f"phase {phase + 1:2d}: mean reward {history[-1]:+.3f}", flush=True)
    weights = get_peft_model_state_dict(pipeline.transformer)
    StableDiffusion3Pipeline.save_lora_weights("minimal", transformer_lora_layers=weights)
    return history


if __name__ == "__main__":
    torch.manual_seed(0)
    train(phases=24)
    print('pipeline.load_lora_weights("minimal") of stock diffusers loads the adapter.')
