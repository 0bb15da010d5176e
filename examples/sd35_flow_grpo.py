"""
Flow-GRPO (https://huggingface.co/papers/2505.05470) on Stable Diffusion 3.5 Medium, with the paper's settings.

A data set is a Hub id, or a folder with a JSON Lines file whose rows have a "prompt". One GPU:

    python examples/sd35_flow_grpo.py --dataset_name prompts/ --output_dir outputs/sd35-clip

Eight GPUs, for the same 1,152 images between two samplings and the same 576 images in an update:

    accelerate launch --num_processes 8 examples/sd35_flow_grpo.py --dataset_name prompts/ \
        --output_dir outputs/sd35-clip --steps_per_generation 18 --gradient_accumulation_steps 9

Every option of `FlowGRPOConfig` can be given, on the command line or in a YAML file with --config; --help lists them.
"""

from dataclasses import dataclass, field

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import CLIPModel, CLIPProcessor
from trl import ScriptArguments, TrlParser

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer


# "paper": stated there. "released": config/grpo.py (OCR, GenEval) of the authors' code, github.com/yifan123/flow_grpo
SETTINGS = {
    # Sampling while training
    "height": 512,  # paper
    "width": 512,  # paper
    "num_inference_steps": 10,  # paper
    "eval_num_inference_steps": 40,  # paper
    "guidance_scale": 4.5,  # paper
    "noise_level": 0.7,  # paper
    # Groups: 48 prompts x 24 images are sampled, and trained on in two updates
    "num_generations": 24,  # paper
    "per_device_train_batch_size": 8,  # ours: images in one forward pass; as many as fit the GPU
    "steps_per_generation": 144,  # released: 48 x 24 images in a sampling phase = 144 x 8
    "gradient_accumulation_steps": 72,  # released: two updates in a sampling phase
    # Update
    "learning_rate": 3e-4,  # paper
    "epsilon": 1e-4,  # paper
    "beta": 0.04,  # paper: for GenEval and OCR; 0.01 for PickScore
    "scale_rewards": "batch",  # released
    "use_ema": True,  # released; the average is what is evaluated and saved
    # Ours
    "max_steps": 1000,
    "save_steps": 50,
    "logging_steps": 2,
}
LORA = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian")  # paper: rank and alpha; released: the rest


class CLIPScore:
    """
    Cosine similarity of image and prompt in CLIP, in [-1, 1]: higher is better.

    Args:
        model (`str`): Hub id or folder of a CLIP model.
    """

    __name__ = "clip_score"

    def __init__(self, model: str):
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = CLIPModel.from_pretrained(model).to(self.device).eval()
        self.processor = CLIPProcessor.from_pretrained(model)

    @torch.no_grad()
    def __call__(self, prompts, images, **kwargs):
        inputs = self.processor(text=prompts, images=images, padding=True, truncation=True, return_tensors="pt")
        output = self.model(**inputs.to(self.device))
        return (output.image_embeds * output.text_embeds).sum(dim=-1).tolist()


@dataclass
class ExampleArguments(ScriptArguments):
    """What the script itself needs, beside TRL's data set options."""

    model_name_or_path: str = field(
        default="stabilityai/stable-diffusion-3.5-medium", metadata={"help": "Hub id or folder of a pipeline."}
    )
    clip_model: str = field(
        default="openai/clip-vit-large-patch14", metadata={"help": "Hub id or folder of the CLIP model that scores."}
    )


def main(args: list[str] | None = None) -> FlowGRPOTrainer:
    parser = TrlParser((ExampleArguments, FlowGRPOConfig))
    parser.set_defaults_with_config(**SETTINGS)
    example_args, training_args = parser.parse_args_and_config(args)
    dataset = load_dataset(example_args.dataset_name, example_args.dataset_config)
    trainer = FlowGRPOTrainer(
        model=example_args.model_name_or_path,
        reward_funcs=CLIPScore(example_args.clip_model),
        args=training_args,
        train_dataset=dataset[example_args.dataset_train_split],
        eval_dataset=dataset[example_args.dataset_test_split] if training_args.eval_strategy != "no" else None,
        peft_config=LORA,
    )
    trainer.train()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return trainer


if __name__ == "__main__":
    main()
