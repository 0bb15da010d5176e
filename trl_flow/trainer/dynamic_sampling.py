"""[`DynamicSampler`]: groups whose rewards have no spread teach nothing: other prompts take their places (DAPO)."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset

from trl_flow.algorithms import Algorithm, PhaseScores
from trl_flow.functional import frac_zero_std
from trl_flow.prompts.rows import read_rows
from trl_flow.rollout import RandomStream, sample_generator
from trl_flow.trainer.flow_rl_config import FlowRLConfig
from trl_flow.trainer.groups import of_one_reading
from trl_flow.trainer.phase_scores import PhaseScorer, ScoringPhase
from trl_flow.trainer.rollout_buffer import RolloutBuffer


@dataclass(eq=False)
class DynamicSampler:
    """Samples groups of a phase again. Each place of the batch has random streams of its own for each attempt, and
    prompts are given out in the order of the places: what is drawn does not depend on the number of processes. All of
    them sample as often, and as many images each time, so that sharded models stay in step."""

    args: FlowRLConfig
    dataset: Dataset
    algorithm: Algorithm
    scorer: PhaseScorer

    def refill(
        self, phase: ScoringPhase, scores: PhaseScores, buffer: RolloutBuffer, generation: int
    ) -> tuple[PhaseScores, dict[str, float]]:
        """The scores of a phase's samples after its groups without spread have been replaced, in `buffer` and `phase`
        too, and metrics."""
        size, prompts, number = self.args.num_generations, None, 0
        flat = self.without_spread(phase, scores)
        num_groups, attempt = len(scores.rewards_per_func) // size, 0
        while flat and attempt < self.args.max_resample_times:
            attempt, number = attempt + 1, number + len(flat)
            if prompts is None:
                taken = set(gather_object([row["prompt"] for row in phase.rows[::size]]))
                prompts = self._further(phase, taken, generation)
            scores = self._sample_again(phase, scores, buffer, generation, attempt, flat, prompts)
            flat = self.without_spread(phase, scores)
        metrics = {"times": attempt, "groups": number, "frac_zero_std": len(flat) / num_groups}
        return scores, {f"dynamic_sample/{name}": value for name, value in metrics.items()}

    def without_spread(self, phase: ScoringPhase, scores: PhaseScores) -> list[int]:
        """The groups of all processes, by their places, whose samples all have the advantage 0."""
        size = self.args.num_generations
        groups = phase.compared(scores.rewards_per_func, scores.instant).split(size)
        return [place for place, rewards in enumerate(groups) if frac_zero_std(rewards, size) == 1]

    def _sample_again(
        self, phase: ScoringPhase, scores: PhaseScores, buffer: RolloutBuffer, generation: int, attempt: int,
        flat: list[int], prompts: Iterator[dict[str, Any]],
    ) -> PhaseScores:  # fmt: skip
        size, rank = self.args.num_generations, self.args.process_index
        each = len(phase.rows) // size  # groups of a process
        of_ranks = [[place for place in flat if place // each == r] for r in range(self.args.world_size)]
        drawn = {place: next(prompts) for place in flat}  # on all processes, so that each goes on with the same
        most = max(map(len, of_ranks))
        own = [place * size + i for place in of_ranks[rank] for i in range(size)]
        rows = of_one_reading([drawn[index // size] for index in own], self.dataset, self.args)
        # Samples that are only there so that all processes have as many, and are neither scored nor kept
        first = rank * len(phase.rows)
        idle = [first + i % size for i in range(most * size - len(own))]
        padded = rows + [phase.rows[index - first] for index in idle]
        sampled = {"indices": own + idle, "attempt": attempt}
        with self.scorer.phase(rows, phase.plan, phase.state, number=most * size) as again:
            for part in self.scorer.sampler.sample(padded, phase.plan, generation, **sampled):
                kept, end = self.algorithm.keep(part.rollout), len(own) - part.first
                for i, index in enumerate(own[part.first : part.first + len(part.images)]):
                    buffer.add(index - first, {name: tensor[i : i + 1] for name, tensor in kept.items()})
                if end > 0:
                    again.add(replace(part, images=part.images[:end]))
            found = again.finish()
        for place, index in enumerate(own):
            phase.rows[index - first], phase.images[index - first] = rows[place], again.images[place]
            for column in phase.logs.columns.values():
                column.pop(index - first, None)
        # Metrics stay those of the samples that were drawn first, as others do
        for name, values in again.logs.columns.items():
            phase.logs.columns[name].update((own[place] - first, value) for place, value in values.items())
        starts = [r * most * size for r in range(self.args.world_size)]
        gathered = [starts[r] + i for r, places in enumerate(of_ranks) for i in range(len(places) * size)]
        places = [place * size + i for place in flat for i in range(size)]
        return scores.replaced(places, found.of(torch.tensor(gathered)))

    def _further(self, phase: ScoringPhase, taken: set[str], generation: int) -> Iterator[dict[str, Any]]:
        """Rows of other prompts than those `taken`, without end: of a small set they come again, with other noise."""
        number, num_groups = len(self.dataset), self.args.generation_batch_size // self.args.num_generations
        if self.args.shuffle_dataset:
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            generator = sample_generator(seed, generation, RandomStream.PROMPTS)
            order = torch.randperm(number, generator=generator).tolist()
        else:
            order = [((generation + 1) * num_groups + i) % number for i in range(number)]
        columns = list(phase.rows[0])

        def read(index: int) -> dict[str, Any]:
            (row,) = read_rows(self.dataset, [index], self.args.seed + generation)
            return {name: row[name] for name in columns}

        # Where all rows have one prompt, and an image each, not all of them are read
        for index in order[: 4 * num_groups]:
            row = read(index)
            if row["prompt"] not in taken:
                taken.add(row["prompt"])
                yield row
        yield from map(read, itertools.cycle(order))
