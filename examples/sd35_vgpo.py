"""
VGPO (https://huggingface.co/papers/2512.12387) on Stable Diffusion 3.5 Medium by text rendering (OCR), with the
paper's settings.

Model, prompts and the rewards' models are downloaded. On one GPU of 40 GB, by the estimate of
`trl-flow memory --config examples/recipes/sd35_ocr_vgpo.yaml`, whose settings are these:

    python examples/sd35_vgpo.py --output_dir outputs/sd35-vgpo

On 32 GPUs, as Flow-GRPO's authors, for the same sampling phase:

    accelerate launch --num_processes 32 examples/sd35_vgpo.py --output_dir outputs/sd35-vgpo \
        --steps_per_generation 4 --gradient_accumulation_steps 2

Every option of `VGPOConfig` can be given on the command line; --help lists them.
"""

from peft import LoraConfig
from trl import ScriptArguments, TrlParser

from trl_flow import FlowGRPOTrainer, OverOptimizationCallback, VGPOConfig
from trl_flow.prompts import load_prompts
from trl_flow.rewards import OCRReward, PickScoreReward


# "paper": stated there. "Flow-GRPO": config/grpo.py (general_ocr_sd3) of github.com/yifan123/flow_grpo, the paper's
# baseline. "Guard": GRPO-Guard, whose Table 1 has the same baseline, and its config/grpo_guard.py
SETTINGS = {
    "dataset_name": "ocr",
    # Sampling while training: Flow-GRPO's
    "height": 512,  # Flow-GRPO
    "width": 512,  # Flow-GRPO
    "num_inference_steps": 10,  # Flow-GRPO; the last of them is not trained, there neither
    "guidance_scale": 4.5,  # Flow-GRPO
    "noise_level": 0.7,  # Flow-GRPO
    "fp16": True,  # Flow-GRPO
    # Groups: 48 prompts x 24 images are sampled, and trained on in two updates
    "num_generations": 24,  # Flow-GRPO
    "per_device_train_batch_size": 9,  # Flow-GRPO
    "steps_per_generation": 128,  # Flow-GRPO: 48 x 24 images in a sampling phase = 128 x 9
    "gradient_accumulation_steps": 64,  # Flow-GRPO: two updates in a sampling phase
    # The method: `VGPOConfig` has dense_rewards (Eq. 9 to 12) and one initial noise for a group (Algorithm 1)
    "value_discount": 0.9,  # ours: gamma is not published for the tasks
    "value_scale": 0.05,  # ours: k is "tuned per task reward" (Eq. 14) and not published
    "scale_rewards": "group",  # has no effect: with dense rewards each step's is the group's (Eq. 14)
    "learning_rate": 3e-4,  # Flow-GRPO
    "epsilon": 1e-4,  # Flow-GRPO
    "beta": 0.0,  # paper: "w/o KL" of Table 1; "w/ KL" is 0.04
    "use_ema": True,  # Flow-GRPO; the average is what is evaluated and saved
    "ema_update_every": 8,  # Flow-GRPO
    # Evaluation
    "eval_strategy": "steps",
    "eval_steps": 60,  # Guard, released: every 30 sampling phases
    "eval_num_inference_steps": 40,  # Flow-GRPO
    "max_steps": 960,  # ours: past the 650 updates of the paper's Figure 3
    "save_steps": 60,  # Guard, released
    "logging_steps": 2,  # ours: once for each sampling phase
}
LORA = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian")  # Flow-GRPO


def main(args: list[str] | None = None) -> FlowGRPOTrainer:
    parser = TrlParser((ScriptArguments, VGPOConfig))
    parser.set_defaults_with_config(**SETTINGS)
    script_args, training_args = parser.parse_args_and_config(args)
    trainer = FlowGRPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=OCRReward(),
        args=training_args,
        train_dataset=load_prompts(script_args.dataset_name, script_args.dataset_train_split),
        eval_dataset=load_prompts(script_args.dataset_name, script_args.dataset_test_split),
        peft_config=LORA,
        eval_reward_funcs=PickScoreReward(),
        callbacks=[OverOptimizationCallback(patience=2)],  # warns, and keeps the best by gold in output_dir/best_gold
    )
    trainer.train()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return trainer


if __name__ == "__main__":
    main()
