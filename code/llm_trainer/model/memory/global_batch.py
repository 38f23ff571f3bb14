# SPDX-License-Identifier: Apache-2.0
"""The share of a global batch that each device takes at once: the most rows whose memory fits."""

import functools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace

from llm_trainer.common.errors import UserError
from llm_trainer.config.global_batch import find_batch_problem, find_global_batch, list_device_batches
from llm_trainer.model.memory.fit import choose_memory_plan, find_share
from llm_trainer.model.memory.scenario import MemoryScenario, ParallelismPlan, list_parallelism_plans
from llm_trainer.model.memory.shape import UnknownShapeError

UNKNOWN_MODEL_ROWS = 8  # a device takes at most so many at once where the model's memory is not known


def split_global_batch(scenario: MemoryScenario) -> MemoryScenario:
    """Return the job with the rows of a device and the accumulation that its global batch asks for, if it has one.

    Raises UserError where the devices cannot share it.
    """
    training, num_devices = scenario.settings.training, scenario.target.world_size
    rows = find_global_batch(training, scenario.settings.data)
    if rows is None:
        return scenario
    if problems := [*find_batch_problem(training, scenario.settings.data, num_devices)]:
        raise UserError(*problems)
    sizes = list_device_batches(rows, num_devices, training)
    try:
        scenario = replace(scenario, known_shape=scenario.shape)
        size = choose_size(scenario, sizes)
    except UnknownShapeError:
        size = next((size for size in sizes if size <= UNKNOWN_MODEL_ROWS), sizes[-1])
    return take_rows(scenario, size, rows // (num_devices * size))


def find_shortage(scenario: MemoryScenario, num_devices: int) -> str | None:
    """Return why the job would not fit on so many devices of the same kind; None where it would."""
    try:
        choose_memory_plan(
            split_global_batch(replace(scenario, target=replace(scenario.target, world_size=num_devices)))
        )
    except UserError as error:
        return str(error)
    return None


def describe_fewer_hosts(scenario: MemoryScenario, counts: Sequence[int]) -> str | None:
    """Return a sentence where the fewest hosts that the job may go on with lack memory; None where they do not.

    `counts` are the numbers of hosts that may train, the most first.
    """
    most, fewest = counts[0], counts[-1]
    if fewest == most or not (shortage := find_shortage(scenario, fewest * scenario.target.world_size // most)):
        return None
    return f"With {fewest} hosts, which min_hosts allows, the job would not fit: {shortage}"


def choose_size(scenario: MemoryScenario, sizes: list[int]) -> int:
    """Return the first of these numbers of rows, the most first, that fits; else the last. Raise UnknownShapeError.

    The cheapest way to spread the step counts first, and then the number of rows: less work is better than more at
    once.
    """

    def fits(size: int, plan: ParallelismPlan) -> bool:
        split = take_rows(scenario, size, 2 if size < sizes[0] else 1)
        try:
            return split.can_hold(split.estimate(plan), find_share(split, plan))
        except UnknownShapeError:  # so many rows may take too many operations to follow
            if size == sizes[-1]:
                raise
            return False

    if len(sizes) > 1:
        for plan in list_parallelism_plans(scenario.settings, scenario.target):
            if fits(sizes[-1], plan):  # each estimate traces a step, which takes seconds for a large model
                return sizes[bisect_left(sizes[:-1], True, key=functools.partial(fits, plan=plan))]
    return sizes[-1]


def take_rows(scenario: MemoryScenario, size: int, steps: int) -> MemoryScenario:
    """Return the job whose devices take `size` rows at once, and add up the gradients of `steps` batches.

    Neither counts as given: another machine derives its own from the settings that the user gave.
    """
    training = scenario.settings.training
    training = training.fill_in(per_device_train_batch_size=size, gradient_accumulation_steps=steps)
    return replace(scenario, settings=replace(scenario.settings, training=training))
