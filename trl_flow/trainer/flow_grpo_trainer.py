"""[`FlowGRPOTrainer`]: GRPO for flow-matching and diffusion text-to-image pipelines."""

from trl_flow.algorithms import ClippedPolicyGradient
from trl_flow.trainer.flow_grpo_config import FlowGRPOConfig
from trl_flow.trainer.flow_rl_trainer import FlowRLTrainer


class FlowGRPOTrainer(FlowRLTrainer):
    """
    Trainer for Flow-GRPO and, by its configuration, DanceGRPO, GRPO-Guard, SLAS, VGPO and their combinations. Its
    arguments are those of [`FlowRLTrainer`], its configuration is a [`FlowGRPOConfig`].

    Example:

    ```python
    from datasets import Dataset
    from peft import LoraConfig
    from PIL import ImageStat
    from trl_flow import FlowGRPOTrainer, GuardConfig


    def darkness(prompts, images, **kwargs):
        return [1 - ImageStat.Stat(image.convert("L")).mean[0] / 255 for image in images]


    trainer = FlowGRPOTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=darkness,
        args=GuardConfig(output_dir="sd35-dark", per_device_train_batch_size=8),
        train_dataset=Dataset.from_dict({"prompt": ["a street at night", "a cat on a sofa"]}),
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )
    trainer.train()
    ```
    """

    _name = "Flow-GRPO"
    config_class = FlowGRPOConfig

    def create_algorithm(self) -> ClippedPolicyGradient:
        return ClippedPolicyGradient(self.args, self.backbone, self.reward_weights)
