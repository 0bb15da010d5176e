"""
AWM (https://huggingface.co/papers/2509.25050) on Stable Diffusion 3.5 Medium by PickScore, with the released settings.

Model, prompts and the rewards' models are downloaded. On one GPU of 40 GB, by the estimate of
`trl-flow memory --config examples/recipes/sd35_pickscore_awm.yaml`, whose settings are these:

    python examples/sd35_awm.py --output_dir outputs/sd35-awm

On 8 GPUs, as the authors, for the same sampling phase:

    accelerate launch --num_processes 8 examples/sd35_awm.py --output_dir outputs/sd35-awm \
        --steps_per_generation 12 --gradient_accumulation_steps 12

Every option of `AWMConfig` can be given on the command line; --help lists them.
"""

from peft import LoraConfig
from trl import ScriptArguments, TrlParser

from trl_flow import AWMConfig, AWMTrainer, OverOptimizationCallback
from trl_flow.prompts import load_prompts
from trl_flow.rewards import HPSv2Reward, ImageReward, PickScoreReward


# "released": config/base_awm.py, config/dgx_awm.py (pickscore_sd3_no_cfg_1node) and scripts/train_sd3_awm.py of
# github.com/scxue/advantage_weighted_matching
SETTINGS = {
    "dataset_name": "pickscore",  # released
    # Sampling while training, along the ODE
    "height": 512,  # released
    "width": 512,  # released
    "num_inference_steps": 14,  # released
    "guidance_scale": 1.0,  # released: none
    "fp16": True,  # released
    # Groups: 24 prompts x 24 images are sampled, and trained on in one update
    "num_generations": 24,  # released
    "per_device_train_batch_size": 6,  # released
    "steps_per_generation": 96,  # released: 24 x 24 images in a sampling phase = 96 x 6
    "gradient_accumulation_steps": 96,  # released: one update in a sampling phase
    # The method
    "timesteps_per_sample": 6,  # released
    "timestep_range": [0, 12],  # released
    "timestep_weighting": "t",  # released
    "huber_power": 0.25,  # released
    "epsilon": 1.0,  # released; without an effect as long as there is one update
    "beta": 1e-4,  # released: of the KL
    "beta_old": 1.0,  # released: of the KL to a slow copy of the policy
    "old_decay": 0.3,  # released: the copy keeps min(0.001 n, 0.3) of itself after n updates
    "old_decay_rate": 0.001,  # released
    "scale_rewards": "batch",  # released
    "learning_rate": 3e-4,  # released
    "use_ema": True,  # released; the average is what is evaluated and saved
    "ema_decay": 0.99,  # released
    # Evaluation
    "eval_strategy": "steps",
    "eval_steps": 50,  # released
    "eval_num_inference_steps": 40,  # released
    "max_steps": 1000,  # ours
    "save_steps": 50,  # released
    "logging_steps": 1,  # ours: once for each sampling phase
}
LORA = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian")  # released


def main(args: list[str] | None = None) -> AWMTrainer:
    parser = TrlParser((ScriptArguments, AWMConfig))
    parser.set_defaults_with_config(**SETTINGS)
    script_args, training_args = parser.parse_args_and_config(args)
    trainer = AWMTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=PickScoreReward(),
        args=training_args,
        train_dataset=load_prompts(script_args.dataset_name, script_args.dataset_train_split),
        eval_dataset=load_prompts(script_args.dataset_name, script_args.dataset_test_split),
        peft_config=LORA,
        eval_reward_funcs=[HPSv2Reward(), ImageReward()],
        callbacks=[OverOptimizationCallback(patience=2)],  # warns, and keeps the best by gold in output_dir/best_gold
    )
    trainer.train()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return trainer


if __name__ == "__main__":
    main()
