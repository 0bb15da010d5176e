"""
Flow-GRPO (https://huggingface.co/papers/2505.05470) on Stable Diffusion 3.5 Medium by PickScore, with the paper's
settings.

Model, reward model and the paper's prompts are downloaded; `--dataset_name` takes prompts of your own. One GPU:

    python examples/sd35_flow_grpo.py --output_dir outputs/sd35-pickscore

Eight GPUs, for the same 1,152 images between two samplings and the same 576 images in an update:

    accelerate launch --num_processes 8 examples/sd35_flow_grpo.py --output_dir outputs/sd35-pickscore \
        --steps_per_generation 18 --gradient_accumulation_steps 9

Every option of `FlowGRPOConfig` can be given, on the command line or in a YAML file with --config; --help lists them.
"""

from dataclasses import dataclass, field

from peft import LoraConfig
from trl import ScriptArguments, TrlParser

from trl_flow import FlowGRPOConfig, FlowGRPOTrainer
from trl_flow.prompts import load_prompts
from trl_flow.rewards import PickScoreReward


# "paper": stated there. "released": config/grpo.py (pickscore_sd3) of the authors' code, github.com/yifan123/flow_grpo
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
    "beta": 0.01,  # paper: for PickScore; 0.04 for GenEval and OCR
    "scale_rewards": "batch",  # released
    "use_ema": True,  # released; the average is what is evaluated and saved
    "ema_update_every": 8,  # released
    # Ours
    "max_steps": 1000,
    "save_steps": 50,
    "logging_steps": 2,
}
LORA = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian")  # paper: rank and alpha; released: the rest


@dataclass
class ExampleArguments(ScriptArguments):
    """What the script itself needs, in addition to TRL's data set options."""

    model_name_or_path: str = field(
        default="stabilityai/stable-diffusion-3.5-medium", metadata={"help": "Hub id or folder of a pipeline."}
    )
    dataset_name: str = field(
        default="pickscore",
        metadata={"help": "Prompts: a set of `trl_flow.prompts`, a file, a folder or a data set on the Hub."},
    )
    reward_model: str = field(
        default="yuvalkirstain/PickScore_v1", metadata={"help": "Hub id or folder of the model that scores."}
    )
    reward_processor: str = field(
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K", metadata={"help": "Hub id or folder of its processor."}
    )


def main(args: list[str] | None = None) -> FlowGRPOTrainer:
    parser = TrlParser((ExampleArguments, FlowGRPOConfig))
    parser.set_defaults_with_config(**SETTINGS)
    example_args, training_args = parser.parse_args_and_config(args)
    evaluate = training_args.eval_strategy != "no"
    trainer = FlowGRPOTrainer(
        model=example_args.model_name_or_path,
        reward_funcs=PickScoreReward(example_args.reward_model, example_args.reward_processor),
        args=training_args,
        train_dataset=load_prompts(example_args.dataset_name, example_args.dataset_train_split),
        eval_dataset=load_prompts(example_args.dataset_name, example_args.dataset_test_split) if evaluate else None,
        peft_config=LORA,
    )
    trainer.train()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return trainer


if __name__ == "__main__":
    main()
