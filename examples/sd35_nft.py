"""
DiffusionNFT (https://huggingface.co/papers/2509.16117) on Stable Diffusion 3.5 Medium by PickScore, with the released
settings.

Model, prompts and the rewards' models are downloaded. On one GPU of 40 GB, by the estimate of
`trl-flow memory --config examples/recipes/sd35_pickscore_nft.yaml`, whose settings are these:

    python examples/sd35_nft.py --output_dir outputs/sd35-nft

On 8 GPUs, as the authors, for the same sampling phase:

    accelerate launch --num_processes 8 examples/sd35_nft.py --output_dir outputs/sd35-nft \
        --steps_per_generation 16 --gradient_accumulation_steps 16

Every option of `DiffusionNFTConfig` can be given on the command line; --help lists them.
"""

from peft import LoraConfig
from trl import ScriptArguments, TrlParser

from trl_flow import DiffusionNFTConfig, DiffusionNFTTrainer, OverOptimizationCallback
from trl_flow.prompts import load_prompts
from trl_flow.rewards import HPSv2Reward, ImageReward, PickScoreReward


# "released": config/base.py, config/nft.py (sd3_pickscore) and scripts/train_nft_sd3.py of
# github.com/NVlabs/DiffusionNFT, as found in copies of that repository. Their
# solver of the ODE is of second order, here it is Euler's
SETTINGS = {
    "dataset_name": "pickscore",  # released
    # Sampling while training, along the ODE
    "height": 512,  # released
    "width": 512,  # released
    "num_inference_steps": 10,  # released; all but one of their noise levels are trained on
    "guidance_scale": 1.0,  # released: none
    "fp16": True,  # released
    # Groups: 48 prompts x 24 images are sampled, and trained on in one update
    "num_generations": 24,  # released
    "per_device_train_batch_size": 9,  # released
    "steps_per_generation": 128,  # released: 48 x 24 images in a sampling phase = 128 x 9
    "gradient_accumulation_steps": 128,  # released: one update in a sampling phase
    # The method
    "nft_beta": 1.0,  # released; 0.1 for text rendering and several rewards
    "beta": 1e-4,  # released: of the KL
    "old_decay": 0.5,  # released: the old policy keeps min(0.001 n, 0.5) of itself after n updates
    "old_decay_rate": 0.001,  # released
    "scale_rewards": "batch",  # released
    "learning_rate": 3e-4,  # released
    "use_ema": True,  # released; the average is what is evaluated and saved
    # Evaluation
    "eval_strategy": "steps",
    "eval_steps": 10,  # released
    "eval_num_inference_steps": 40,  # released
    "max_steps": 1000,  # ours: as many as the paper's abstract has for GenEval
    "save_steps": 30,  # released
    "logging_steps": 1,  # ours: once for each sampling phase
}
LORA = LoraConfig(r=32, lora_alpha=64, init_lora_weights="gaussian")  # released


def main(args: list[str] | None = None) -> DiffusionNFTTrainer:
    parser = TrlParser((ScriptArguments, DiffusionNFTConfig))
    parser.set_defaults_with_config(**SETTINGS)
    script_args, training_args = parser.parse_args_and_config(args)
    trainer = DiffusionNFTTrainer(
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
