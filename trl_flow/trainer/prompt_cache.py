"""Conditions of prompts, each computed once and kept until the memory set aside for them is full."""

from collections import OrderedDict

import torch

from trl_flow.backbones.base import Backbone


class PromptCache:
    """
    The conditions of prompts on the CPU, the least recently used forgotten first.

    Each prompt is encoded by itself, never in a batch: its condition then does not depend on which prompts it was
    drawn with, nor on the number of processes.

    Args:
        backbone ([`Backbone`]): encodes.
        max_bytes (`int`): memory for the conditions. 2 GiB hold about 1,200 prompts of Stable Diffusion 3.5.
    """

    def __init__(self, backbone: Backbone, max_bytes: int = 2 * 2**30):
        self.backbone = backbone
        self.max_bytes = max_bytes
        self._bytes = 0
        self._conditions: OrderedDict[str, dict[str, torch.Tensor]] = OrderedDict()

    @torch.no_grad()
    def _get(self, prompt: str) -> dict[str, torch.Tensor]:
        if prompt not in self._conditions:
            condition = {key: value.cpu() for key, value in self.backbone.encode_prompt(prompt).items()}
            self._conditions[prompt] = condition
            self._bytes += sum(value.nbytes for value in condition.values())
        self._conditions.move_to_end(prompt)
        return self._conditions[prompt]

    def __call__(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Conditions of `prompts`, stacked along the batch, on the backbone's device."""
        conditions = [self._get(prompt) for prompt in prompts]
        while self._bytes > self.max_bytes and len(self._conditions) > 1:
            _, condition = self._conditions.popitem(last=False)
            self._bytes -= sum(value.nbytes for value in condition.values())
        return {
            key: torch.cat([condition[key] for condition in conditions]).to(self.backbone.device)
            for key in conditions[0]
        }
