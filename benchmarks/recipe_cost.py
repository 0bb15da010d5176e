"""
What a recipe costs: the operations of the trained model in a whole run, and the GPU hours that these make.

    python benchmarks/recipe_cost.py examples/recipes/sd35_ocr_guard.yaml
    python benchmarks/recipe_cost.py recipe.yaml --model folder --tflops 200

Nothing is downloaded but configuration files, and no GPU is needed: the model is run without data, and its matrix
products are counted, recomputation for gradient checkpointing included. Not counted: VAE, text encoders, rewards, the
ratio's probe, and all waiting. The last line is JSON.
"""

import argparse
import json

import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from trl_flow.backbones import get_backbone
from trl_flow.commands.options import parse_training, peft_config, training_parser
from trl_flow.commands.recipe import read_recipe
from trl_flow.memory import empty_pipeline, fetch_configs
from trl_flow.trainer.forward_process_config import ForwardProcessConfig


# 40 % of what an A100 or A800 has in half precision
TFLOPS = 125
TEST_PROMPTS = {"geneval": 2212, "ocr": 1018, "pickscore": 2048, "hpdv2": 400}


def operations(backbone, policy, args, *, backward: bool) -> int:
    """Of the forward, or the forward and backward, of one image and step, guidance included."""

    def condition():
        shapes = backbone.condition_shapes().items()
        return {name: torch.empty(1, *shape, dtype=dtype, device="meta") for name, (shape, dtype) in shapes}

    latents = torch.empty(1, *backbone.latent_shape(), device="meta")
    negative = condition() if backbone.uses_guidance(args.guidance_scale) else None
    time = torch.empty((), device="meta")
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        prediction = backbone.guided_prediction(policy, latents, time, condition(), negative, 2.0)
        if backward:
            prediction.square().mean().backward()
    return counter.get_total_flops()


def main(argv: list[str] | None = None) -> None:
    """Prints the parts of a run and its GPU hours."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("--model", help="folder with the configuration files, or a hub id; default: the recipe's")
    parser.add_argument("--tflops", type=float, default=TFLOPS, help="of a GPU, in use; default: %(default)s")
    parser.add_argument("--eval-prompts", type=int, help="default: as many as the recipe's set has to test on")
    given = parser.parse_args(argv)
    argv, recipe = read_recipe(["--config", given.recipe])
    script, args, model_args, *_ = parse_training(training_parser(argv, recipe, num_processes=1), argv, recipe)
    pipeline = empty_pipeline(fetch_configs(given.model or model_args.model_name_or_path)).to(torch.float32)
    sizes = {"height": args.height, "width": args.width, "max_sequence_length": args.max_sequence_length}
    backbone = get_backbone(pipeline, **sizes)
    backbone.dtype, policy, lora = torch.float32, backbone.model, peft_config(script, args, model_args)
    if args.gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    if lora is not None:
        policy.requires_grad_(False)
        lora.target_modules = lora.target_modules or list(backbone.lora_target_modules)
        policy = get_peft_model(policy, lora).to("meta")
    policy.train()
    forward = operations(backbone, policy, args, backward=False)
    update = operations(backbone, policy, args, backward=True)

    noised = isinstance(args, ForwardProcessConfig)
    steps = args.timesteps_per_sample if noised else args.num_kept_latents // 3
    images = args.max_steps / args.updates_per_generation * args.generation_batch_size
    trained = images * args.group_size / args.num_generations
    parts = {"sampling": images * args.num_inference_steps * forward, "training": trained * steps * update}
    if args.beta > 0:
        parts["reference"] = trained * steps * forward
    if noised and args.keeps_old:
        parts["old policy"] = trained * steps * forward
    if args.eval_strategy == "steps":
        prompts = given.eval_prompts or TEST_PROMPTS.get(script.dataset_name, 0)
        evaluations = 1 + args.max_steps // args.eval_steps  # the base model first
        parts["evaluations"] = evaluations * prompts * args.eval_num_inference_steps * forward
    hours = {name: number / (given.tflops * 1e12 * 3600) for name, number in parts.items()}
    for name, value in hours.items():
        print(f"{name:12} {value:10.1f} GPU hours")
    per_image = {"forward": forward, "forward and backward": update}
    print(json.dumps({"operations": per_image, "gpu_hours": hours, "total": sum(hours.values())}))


if __name__ == "__main__":
    main()
