"""
SLAS (https://huggingface.co/papers/2605.10937) on Stable Diffusion 1.4 by HPS-v2.1 and CLIP, with the paper's
settings.

Model, prompts and the rewards' models are downloaded. On one GPU of 40 GB, by the estimate of
`trl-flow memory --config examples/recipes/sd14_slas.yaml`, whose settings are these:

    python examples/sd14_slas.py --output_dir outputs/sd14-slas

On 8 GPUs, as DanceGRPO's authors, for the same sampling phase:

    accelerate launch --num_processes 8 examples/sd14_slas.py --output_dir outputs/sd14-slas \
        --steps_per_generation 16 --gradient_accumulation_steps 8

Every option of `SLASConfig` can be given on the command line; --help lists them.
"""

from trl import ScriptArguments, TrlParser

from trl_flow import FlowGRPOTrainer, OverOptimizationCallback, SLASConfig
from trl_flow.prompts import load_prompts
from trl_flow.rewards import CLIPScoreReward, HPSv2Reward, PickScoreReward


# "paper": stated there; its baseline and "identical settings" are DanceGRPO's. "DanceGRPO": fastvideo/train_grpo_sd.py
# and config_sd of github.com/XueZeyue/DanceGRPO, which it is with scale_rewards="group" and advantage_power=0
SETTINGS = {
    "dataset_name": "hpdv2",
    "reward_weights": [1.0, 0.01],  # paper: 1 and 1, of cosines; clipscore is 100 x the cosine
    # Sampling while training: `SLASConfig` has one initial noise for a group
    "height": 512,  # DanceGRPO
    "width": 512,  # DanceGRPO
    "num_inference_steps": 50,  # DanceGRPO
    "guidance_scale": 5.0,  # DanceGRPO
    "noise_level": 1.0,  # DanceGRPO (eta of DDIM)
    "timestep_fraction": 1.0,  # DanceGRPO, of all steps but the last
    # Groups: 32 prompts x 16 images are sampled, and trained on in two updates
    "num_generations": 16,  # DanceGRPO
    "per_device_train_batch_size": 4,  # DanceGRPO
    "steps_per_generation": 128,  # DanceGRPO: 32 x 16 images in a sampling phase = 128 x 4
    "gradient_accumulation_steps": 64,  # DanceGRPO: two updates in a sampling phase
    # The method
    "scale_rewards": "batch",  # paper: the batch's standard deviation in place of the prompt's
    "advantage_power": 0.25,  # ours: gamma is not published
    "learning_rate": 1e-5,  # DanceGRPO, for all weights: there is no adapter
    "epsilon": 1e-4,  # DanceGRPO
    "scale_epsilon": False,  # DanceGRPO's range is for latents of this size
    "beta": 0.0,  # DanceGRPO: no KL
    # Evaluation
    "eval_strategy": "steps",
    "eval_steps": 100,  # ours
    "eval_num_inference_steps": 50,  # ours, as in training
    "max_steps": 600,  # DanceGRPO: 300 sampling phases
    "save_steps": 100,  # ours
    "logging_steps": 2,  # ours: once for each sampling phase
    "seed": 42,  # DanceGRPO
}


def main(args: list[str] | None = None) -> FlowGRPOTrainer:
    parser = TrlParser((ScriptArguments, SLASConfig))
    parser.set_defaults_with_config(**SETTINGS)
    script_args, training_args = parser.parse_args_and_config(args)
    trainer = FlowGRPOTrainer(
        model="CompVis/stable-diffusion-v1-4",
        reward_funcs=[HPSv2Reward("v2.1"), CLIPScoreReward("dfn5b")],
        args=training_args,
        train_dataset=load_prompts(script_args.dataset_name, script_args.dataset_train_split),
        eval_dataset=load_prompts(script_args.dataset_name, script_args.dataset_test_split),
        eval_reward_funcs=PickScoreReward(),
        callbacks=[OverOptimizationCallback(patience=2)],  # warns, and keeps the best by gold in output_dir/best_gold
    )
    trainer.train()
    if training_args.push_to_hub:
        trainer.push_to_hub()
    return trainer


if __name__ == "__main__":
    main()
