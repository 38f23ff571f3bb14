# SPDX-License-Identifier: Apache-2.0
"""The rows of a step on all devices together, as the settings ask for them, and how devices can share them."""

import math
from collections.abc import Iterator, Sequence

from llm_trainer.config.sections import DataSettings, TrainingSettings

TOTALS = ("global_batch_size", "global_batch_tokens")
MOST_ROWS = 256  # more at once make no GPU faster
PIECES = ("per_device_train_batch_size", "gradient_accumulation_steps")


def find_global_batch(training: TrainingSettings, data: DataSettings) -> int | None:
    """Return the rows, or packed sequences, of a step on all devices. None where only those of a device are asked for.

    Tokens that are no multiple of `max_length` are rounded down.
    """
    if training.global_batch_tokens is not None and data.max_length:
        return training.global_batch_tokens // data.max_length
    return training.global_batch_size


def list_device_batches(rows: int, num_devices: int, training: TrainingSettings) -> list[int]:
    """List the rows that a device may take at once, the most first, so that whole steps have `rows` on all devices.

    The devices can share them.
    """
    share = rows // num_devices
    if training.is_given("per_device_train_batch_size"):
        return [training.per_device_train_batch_size]
    if training.is_given("gradient_accumulation_steps"):
        return [share // training.gradient_accumulation_steps]
    return [size for size in range(min(share, MOST_ROWS), 0, -1) if share % size == 0]


def find_batch_problem(training: TrainingSettings, data: DataSettings, num_devices: int) -> Iterator[str]:
    """Yield a sentence where the devices of the job cannot share its global batch."""
    rows = find_global_batch(training, data)
    if rows is None:
        return
    given = {name: training.value(name) for name in PIECES if training.is_given(name)}
    unit = math.prod([num_devices, *given.values()])
    factors = " x ".join([f"{num_devices} devices", *(f"{name}={value}" for name, value in given.items())])
    name, scale = "global_batch_size", 1
    if training.global_batch_tokens is not None:
        name, scale = "global_batch_tokens", data.max_length or 1
    if len(given) == len(PIECES) and rows != unit:
        yield f"{name}={rows * scale} is not {factors} = {unit * scale}: change one of them, or leave one out."
    elif rows % unit:
        nearest = show_nearest(rows, unit, scale)
        yield f"{name}={rows * scale} cannot be shared by {factors}: give {nearest}."


def describe_batch(size: int, num_devices: int, steps: int, unit: str = "rows") -> str:
    """Return the formula of a step: a device takes `size` rows at once, `steps` times. `unit` is the word for rows."""
    rows = size * num_devices * steps
    return f"global batch {rows} {unit} = {size} a device x {num_devices} devices x {steps} accumulation steps"


def describe_smaller_pieces(training: TrainingSettings) -> str:
    """Return words for what has devices take fewer rows at once, in steps of as many rows."""
    size, steps = (training.value(name) for name in PIECES)
    given = [name for name in PIECES if training.is_given(name)]
    lower = f"lower per_device_train_batch_size (now {size})"
    higher = f"raise gradient_accumulation_steps (now {steps})"
    if not training.is_given(*TOTALS) or len(given) == len(PIECES):
        return f"{lower} and {higher} as much"
    if given:
        return lower if training.is_given("per_device_train_batch_size") else higher
    return "set a per_device_train_batch_size below what the log's line on the global batch says"


def list_host_counts(
    training: TrainingSettings, data: DataSettings, hosts: Sequence[str], min_hosts: int | None, num_processes: int
) -> list[int]:
    """List with how many of its hosts, each of `num_processes` devices, a job may train: the most first.

    All of them, and where `min_hosts` allows fewer those numbers that can share the global batch.
    """
    most = len(hosts)
    fewer = range(most - 1, (min_hosts or most) - 1, -1)
    problems = {count: [*find_batch_problem(training, data, count * num_processes)] for count in fewer}
    return [most, *(count for count, found in problems.items() if not found)]


def show_nearest(value: int, unit: int, scale: int = 1) -> str:
    """Return the two multiples of `unit` nearest to a value that is none, each times `scale`; no zero."""
    below = value // unit * unit
    return " or ".join(str(multiple * scale) for multiple in (below, below + unit) if multiple)
