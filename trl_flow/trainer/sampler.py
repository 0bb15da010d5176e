"""[`Sampler`]: rows of the data set and a plan in, sampled parts out, reproducible sample by sample."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from trl_flow.dynamics import Dynamics
from trl_flow.images import Sample, to_rgb
from trl_flow.rollout import RandomStream, Rollout, StepPlan, decode, draw_noise, rollout, sample_generator
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.policy import Policy


@dataclass(frozen=True)
class SampledPart:
    """Samples with their finished images (or videos); `first` is the first one's index among those of this process."""

    first: int
    rollout: Rollout
    images: list[Sample]


@dataclass(eq=False)
class Sampler:
    """Samples generation batches in parts of one forward's size, and tells `show_stage` what is going on. Each
    sample's noise comes from generators of its own, made from its index in the global batch: what is drawn depends
    neither on the size of a part nor on the number of processes."""

    policy: Policy
    dynamics: Dynamics
    args: FlowRLConfig
    show_stage: Callable[[str], None]
    weights: str = "trained"  # a name for `policy.at`

    def sample(
        self, rows: list[dict[str, Any]], plan: StepPlan, generation: int, *, indices: Sequence[int] | None = None,
        attempt: int = 0,
    ) -> Iterator[SampledPart]:  # fmt: skip
        """The local part of a generation batch: `rows` has one for each image of this process, and `indices`, where
        they are sampled again, their indices in the global batch, of whole groups. Raises `FloatingPointError` if the
        latents are not finite."""
        size, num_steps = self.args.per_device_train_batch_size, self.args.num_inference_steps
        if indices is None:
            indices = range(self.args.process_index * len(rows), (self.args.process_index + 1) * len(rows))
        first_step, starts, predicted = self._starts(generation, rows, plan, indices, attempt)
        for first in range(0, len(rows), size):
            part, start = rows[first : first + size], starts[first : first + size]
            stage = f"sampling images {first + 1} to {first + len(part)} of {len(rows)}, step "
            options = {"generators": self._generators(generation, indices[first : first + size], attempt)}
            options["on_step"] = lambda step, stage=stage: self.show_stage(f"{stage}{step + 1} of {num_steps}")
            sampled = self._rollout(part, start, plan, first_step=first_step, **options)
            if not sampled.final.isfinite().all():
                raise FloatingPointError(
                    f"Sampling gave NaN or infinite latents for the prompts {[row['prompt'] for row in part[:3]]}. In "
                    "the first phase, noise_level or the precision is at fault. Later, training has diverged: lower "
                    "learning_rate and resume from an earlier checkpoint."
                )
            if predicted is not None:
                both = torch.cat([predicted[first : first + size], sampled.pred_original_samples], dim=1)
                sampled = dataclasses.replace(sampled, pred_original_samples=both)
            self.show_stage("decoding")
            yield SampledPart(first, sampled, decode(self.policy.backbone, sampled.final))

    def images_to_edit(self, rows: list[dict[str, Any]]) -> list[Image.Image] | None:
        """The rows' images, RGB, where the backbone takes one."""
        return [to_rgb(row["image"]) for row in rows] if self.policy.backbone.takes_image else None

    def _rollout(self, rows: list[dict[str, Any]], latents: torch.Tensor, plan: StepPlan, **kwargs) -> Rollout:
        condition = self.policy.condition([row["prompt"] for row in rows], self.images_to_edit(rows))
        with self.policy.at(self.weights):
            predict = functools.partial(self.policy.predict, condition=condition)
            return rollout(predict, self.dynamics, latents, plan, **kwargs)

    def _generators(
        self, generation: int, indices: Iterable[int], attempt: int, stream: RandomStream = RandomStream.TRANSITIONS
    ) -> list[torch.Generator]:
        again = (attempt,) if attempt else ()
        return [sample_generator(self.args.seed, generation, stream, index, *again) for index in indices]

    def _starts(
        self, generation: int, rows: list[dict[str, Any]], plan: StepPlan, indices: Sequence[int], attempt: int
    ) -> tuple[int, torch.Tensor, torch.Tensor | None]:
        """Where the local samples of a generation batch begin: a step, the latents there, `(N, ...)`, and with
        `plan.project` the clean latents predicted before, if any. With `share_initial_noise` the images of a group are
        one and the same up to the first stochastic step: the ODE steps before it are taken once for each group."""
        number, size, first_step = len(rows), self.args.num_generations, min(plan.stochastic, default=0)
        if not self.args.share_initial_noise:
            return 0, self._initial_noise(generation, indices, attempt), None
        groups = [index // size for index in indices]
        distinct = sorted(set(groups))
        latents, predicted = self._initial_noise(generation, distinct, attempt), None
        if first_step > 0:
            # A process may have the end of one group and the beginning of another, and so one group more than others:
            # all take as many forwards, so that sharded ones stay in step
            ends = [(rank * number, (rank + 1) * number - 1) for rank in range(self.args.world_size)]
            most = max(last // size - first // size for first, last in ends) + 1
            firsts = [rows[groups.index(group)] for group in distinct]
            firsts += firsts[-1:] * (most - len(firsts))
            padded = latents[[min(i, len(distinct) - 1) for i in range(most)]]
            latents, predicted = self._ode_prefix(firsts, padded, first_step, StepPlan(project=plan.project))
        places = [distinct.index(group) for group in groups]
        return first_step, latents[places], None if predicted is None else predicted[places]

    def _ode_prefix(
        self, rows: list[dict[str, Any]], noise: torch.Tensor, num_steps: int, plan: StepPlan
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The latents of `rows` after `num_steps` ODE steps from `noise`, both `(M, ...)`, and with `plan.project` the
        clean latents predicted after each step but the last, `(M, num_steps - 1, ...)`."""
        size, parts, stage = self.args.per_device_train_batch_size, [], "sampling the groups' common steps, step "
        options = {"last_step": num_steps}
        options["on_step"] = lambda step: self.show_stage(f"{stage}{step + 1} of {num_steps}")
        for first in range(0, len(rows), size):
            part, start = rows[first : first + size], noise[first : first + size]
            parts.append(self._rollout(part, start, plan, **options))
        predicted = torch.cat([part.pred_original_samples for part in parts]) if plan.project else None
        return torch.cat([part.final for part in parts]), predicted

    def _initial_noise(self, generation: int, indices: Iterable[int], attempt: int = 0) -> torch.Tensor:
        """`x_1` of samples by their global indices, or with `share_initial_noise` of groups by theirs."""
        generators = self._generators(generation, indices, attempt, RandomStream.INITIAL_NOISE)
        return draw_noise(self.policy.backbone.latent_shape(), generators, self.policy.accelerator.device)
