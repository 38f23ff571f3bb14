# SPDX-License-Identifier: Apache-2.0
"""The amount of work in a job's data, and the steps that this makes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from llm_trainer.config.sections import DataSettings, TrainingSettings
from llm_trainer.model.memory.flops import measure_row_tokens
from llm_trainer.model.memory.scenario import MemoryScenario

FILLED_SHARE = 0.999  # of packed sequences (bench/RESULTS.md, Data)


@dataclass(frozen=True)
class Workload:
    """The rows of an epoch. Tokens are counted as cut to `max_length`."""

    num_sequences: int  # those of the rows, or those that the rows are packed into
    num_tokens: int
    row_tokens: float  # length of the row that a token stands in, on average over all tokens
    longest_row: int  # in tokens, before it is cut
    eval_tokens: int = 0  # of an evaluation
    scored_share: float = 1.0  # of all tokens, those that predict a label
    sequences_a_row: int = 1  # 2 where rows are pairs

    @property
    def sequence_tokens(self) -> float:
        """The mean length of a sequence in tokens."""
        return self.num_tokens / self.num_sequences

    def fill_batch(self, scenario: MemoryScenario) -> MemoryScenario:
        """Return the scenario with a batch of rows of the mean length."""
        mean = math.ceil(min(self.sequence_tokens, scenario.length))
        batch = replace(scenario, longest_row=mean, known_shape=scenario.shape).batch
        scored = round(self.scored_share * batch.num_tokens)
        return replace(scenario, known_batch=replace(batch, num_scored=scored), known_shape=scenario.shape)

    def count_steps(self, rows_a_step: int, training: TrainingSettings) -> int:
        """Return the steps of the whole training: `max_steps` where it is given, else those of all epochs."""
        if training.max_steps > 0:
            return training.max_steps
        num_rows = self.num_sequences // self.sequences_a_row
        return max(1, math.ceil(training.num_train_epochs * max(1, num_rows // rows_a_step)))


def measure_work(
    lengths: Mapping[int, int], eval_lengths: Mapping[int, int], data: DataSettings, scored_share: float = 1.0
) -> Workload:
    """Return the work in data with so many sequences of each length in tokens.

    `scored_share` of the tokens have a label.
    """
    num_sequences, num_tokens = sum(lengths.values()), count_tokens(lengths, data.max_length)
    packed_tokens = data.max_length if data.packing else None
    return Workload(
        num_sequences=math.ceil(num_tokens / FILLED_SHARE / packed_tokens) if packed_tokens else num_sequences,
        num_tokens=num_tokens,
        row_tokens=measure_row_tokens(lengths, data.max_length),
        longest_row=max(lengths),
        eval_tokens=count_tokens(eval_lengths, data.max_length),
        scored_share=scored_share,
        sequences_a_row=data.sequences_a_row,
    )


def count_tokens(lengths: Mapping[int, int], max_length: int | None) -> int:
    """Return the tokens of so many sequences of each length, cut to `max_length`."""
    return sum(rows * min(length, max_length or length) for length, rows in lengths.items())
