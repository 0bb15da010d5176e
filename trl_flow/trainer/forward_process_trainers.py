"""[`DiffusionNFTTrainer`] and [`AWMTrainer`]: learning on noised images."""

from trl_flow.algorithms import AdvantageWeightedMatching, NegativeAwareFinetuning
from trl_flow.trainer.flow_rl_trainer import FlowRLTrainer
from trl_flow.trainer.forward_process_config import AWMConfig, DiffusionNFTConfig


class DiffusionNFTTrainer(FlowRLTrainer):
    """
    Trainer for DiffusionNFT (arXiv:2509.16117). Its arguments are those of [`FlowRLTrainer`], its configuration is a
    [`DiffusionNFTConfig`].

    Example:

    ```python
    from datasets import Dataset
    from peft import LoraConfig
    from trl_flow import DiffusionNFTConfig, DiffusionNFTTrainer
    from trl_flow.rewards import PickScoreReward

    trainer = DiffusionNFTTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=PickScoreReward(),
        args=DiffusionNFTConfig(output_dir="sd35-nft", per_device_train_batch_size=8),
        train_dataset=Dataset.from_dict({"prompt": ["a street at night", "a cat on a sofa"]}),
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )
    trainer.train()
    ```
    """

    _name = "DiffusionNFT"
    config_class = DiffusionNFTConfig

    def create_algorithm(self) -> NegativeAwareFinetuning:
        return NegativeAwareFinetuning(self.args, self.backbone, self.reward_weights)


class AWMTrainer(FlowRLTrainer):
    """Trainer for AWM, Advantage Weighted Matching (arXiv:2509.25050). Its arguments are those of [`FlowRLTrainer`],
    its configuration is an [`AWMConfig`]. Use it like [`DiffusionNFTTrainer`].

    Example:

    ```python
    from peft import LoraConfig
    from trl_flow import AWMConfig, AWMTrainer
    from trl_flow.prompts import generate_geneval_prompts
    from trl_flow.rewards import JPEGCompressibilityReward

    trainer = AWMTrainer(
        model="stabilityai/stable-diffusion-3.5-medium",
        reward_funcs=JPEGCompressibilityReward(),
        args=AWMConfig(output_dir="sd35-awm", per_device_train_batch_size=8),
        train_dataset=generate_geneval_prompts(1000),
        peft_config=LoraConfig(r=32, lora_alpha=64),
    )
    trainer.train()
    ```
    """

    _name = "AWM"
    config_class = AWMConfig

    def create_algorithm(self) -> AdvantageWeightedMatching:
        return AdvantageWeightedMatching(self.args, self.backbone, self.reward_weights)
