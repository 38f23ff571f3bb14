# SPDX-License-Identifier: Apache-2.0
"""The amount of work in a job's data, and the steps that this makes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from llm_trainer.config.generation import GenerationSettings, count_eval_group, count_group, count_iterations
from llm_trainer.config.sections import TrainingSettings
from llm_trainer.model.memory.flops import count_tokens, measure_row_tokens
from llm_trainer.model.memory.scenario import MemoryScenario

FILLED_SHARE = 0.999  # of packed sequences (bench/RESULTS.md, Data)


@dataclass(frozen=True)
class Workload:
    """The rows of an epoch. Tokens are counted as cut to `max_length`, and completions as long as they may be."""

    num_sequences: int  # those of the rows, or those that the rows are packed into
    num_tokens: int
    row_tokens: float  # length of the row that a token stands in, on average over all tokens
    longest_row: int  # in tokens, before it is cut
    eval_tokens: int = 0  # of an evaluation
    scored_share: float = 1.0  # of all tokens, those that predict a label
    sequences_a_row: int = 1  # 2 where rows are pairs
    read_tokens: int = 0  # of the rows that are tokenized, those of an evaluation among them
    num_iterations: int = 1  # steps that a completion is trained on in

    @property
    def sequence_tokens(self) -> float:
        """The mean length of a sequence in tokens."""
        return self.num_tokens / self.num_sequences

    def fill_batch(self, scenario: MemoryScenario) -> MemoryScenario:
        """Return the scenario with a batch of rows of the mean length."""
        mean = math.ceil(min(self.sequence_tokens, scenario.length)) - scenario.settings.completion_tokens
        batch = replace(scenario, longest_row=mean, known_shape=scenario.shape).batch
        scored = round(self.scored_share * batch.num_tokens)
        return replace(scenario, known_batch=replace(batch, num_scored=scored), known_shape=scenario.shape)

    def count_steps(self, rows_a_step: int, training: TrainingSettings) -> int:
        """Return the steps of the whole training: `max_steps` where it is given, else those of all epochs."""
        if training.max_steps > 0:
            return training.max_steps
        num_rows = self.num_sequences // self.sequences_a_row
        steps = self.num_iterations * max(1, num_rows // rows_a_step)
        return max(1, math.ceil(training.num_train_epochs * steps))


def measure_work(
    lengths: Mapping[int, int],
    eval_lengths: Mapping[int, int],
    settings: GenerationSettings,
    scored_share: float = 1.0,
) -> Workload:
    """Return the work in data with so many sequences of each length in tokens, or so many prompts.

    `scored_share` of the tokens have a label.
    """
    if settings.data.generates:
        return measure_writing(lengths, eval_lengths, settings)
    data = settings.data
    num_sequences, num_tokens = sum(lengths.values()), count_tokens(lengths, data.max_length)
    eval_tokens = count_tokens(eval_lengths, data.max_length)
    packed_tokens = data.max_length if data.packing else None
    return Workload(
        num_sequences=math.ceil(num_tokens / FILLED_SHARE / packed_tokens) if packed_tokens else num_sequences,
        num_tokens=num_tokens,
        row_tokens=measure_row_tokens(lengths, data.max_length),
        longest_row=max(lengths),
        eval_tokens=eval_tokens,
        scored_share=scored_share,
        sequences_a_row=data.sequences_a_row,
        read_tokens=num_tokens + eval_tokens,
    )


def measure_writing(
    prompts: Mapping[int, int], eval_prompts: Mapping[int, int], settings: GenerationSettings
) -> Workload:
    """Return the work in so many prompts of each length in tokens, whose completions are as long as they may be."""
    written = settings.methods.count_written(settings.data.method)
    lengths = complete(prompts, count_group(settings), settings)
    num_sequences, num_tokens = sum(lengths.values()), count_tokens(lengths, None)
    return Workload(
        num_sequences=num_sequences,
        num_tokens=num_tokens,
        row_tokens=measure_row_tokens(lengths, None),
        longest_row=max(prompts),
        eval_tokens=count_tokens(complete(eval_prompts, count_eval_group(settings), settings), None),
        scored_share=num_sequences * written / max(1, num_tokens),
        read_tokens=count_tokens(prompts, None) + count_tokens(eval_prompts, None),
        num_iterations=count_iterations(settings),
    )


def complete(prompts: Mapping[int, int], group: int, settings: GenerationSettings) -> dict[int, int]:
    """Return the sequences of so many prompts of each length, each with a group of completions.

    Prompts longer than `max_length` are left out, as nothing is cut from them.
    """
    written, limit = settings.methods.count_written(settings.data.method), settings.data.max_length
    return {length + written: rows * group for length, rows in prompts.items() if length <= (limit or length)}
