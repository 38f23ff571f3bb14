# SPDX-License-Identifier: Apache-2.0
"""The hours that a job is billed for: its start, its steps, evaluations, checkpoints and the export."""

import math
from dataclasses import dataclass

from llm_trainer.config.sections import TrainingSettings
from llm_trainer.planning.instances import InstanceType

IMAGE_BYTES = 6.6e9  # unpacked, without CUDA's own of the host (bench/RESULTS.md, Image)
PULL_BYTES = 100e6  # a second, of an image that is pulled and unpacked: an assumption
PULL_SECONDS = IMAGE_BYTES / PULL_BYTES
DOWNLOAD_BYTES = 500e6  # a second, of a model from S3 or the Hub, at most: an assumption
DISK_BYTES = 2e9  # a second, at which weights are read, and a checkpoint is written and read again: an assumption
IMPORT_SECONDS = 15.0  # launcher, imports, the first step's allocations and kernels (bench/RESULTS.md, Start)
TOKENS_A_VCPU = 200e3  # a second, read, rendered and tokenized (bench/RESULTS.md, Data: 420,000 on two)
EVALUATION_SHARE = 0.4  # of a token's time in training: the forward pass of three, and the weights are read as often
# As save_and_stop.py has it where the settings name no interval:
CHECKPOINTS_A_RUN = 10
SECONDS_BETWEEN = 900.0
# The start may take this share of what is reckoned, or so many times as long.
START_LOW, START_HIGH = 0.5, 2.0


@dataclass(frozen=True)
class Sizes:
    """Bytes that a job reads and writes, on all hosts together."""

    base: int  # of the weights that it downloads and reads
    checkpoint: int
    result: int  # that is written and uploaded


@dataclass(frozen=True)
class RunTime:
    """Seconds of a job's parts, on each of its hosts."""

    start: float
    steps: float
    evaluations: float
    checkpoints: float
    export: float
    low: float  # what all of it takes at least
    high: float  # and at most

    @property
    def seconds(self) -> float:
        """The seconds in all."""
        return self.start + self.steps + self.evaluations + self.checkpoints + self.export

    @property
    def hours(self) -> float:
        """The hours in all."""
        return self.seconds / 3600


@dataclass(frozen=True)
class Steps:
    """The steps of a training: their number, seconds, and what the training does between them."""

    number: int
    seconds: float
    low_seconds: float
    high_seconds: float
    tokens: int  # that are tokenized
    eval_tokens: int  # of all evaluations
    reference_tokens: int  # of rows that the reference is asked about before the first step
    tokens_per_second: float
    checkpoints: int
    # The time of a batch beside its own forward and backward pass, in forward passes: of a reference, for example.
    untrained_passes: float = 0.0
    evaluation_passes: float = 0.0  # the same in evaluations

    @property
    def evaluation_share(self) -> float:
        """The share of a token's time in training that it takes without a backward pass."""
        return (1 + self.evaluation_passes) * EVALUATION_SHARE / (1 + self.untrained_passes * EVALUATION_SHARE)

    def time_forward(self, tokens: int) -> float:
        """Return the seconds of so many tokens that are not trained on."""
        return self.evaluation_share * tokens / self.tokens_per_second


def time_run(host: InstanceType, count: int, steps: Steps, sizes: Sizes) -> RunTime:
    """Return the time of a job on so many hosts. A reference that is asked first counts in its start."""
    training = steps.number * steps.seconds
    evaluations, asking = steps.time_forward(steps.eval_tokens), steps.time_forward(steps.reference_tokens)
    checkpoints = steps.checkpoints * sizes.checkpoint / DISK_BYTES
    start = time_start(host, count, sizes.base, steps.tokens)
    export = sizes.base / DISK_BYTES + sizes.result / find_download_rate(host)
    other, computing = start + export, training + evaluations + asking
    return RunTime(
        start + asking,
        training,
        evaluations,
        checkpoints,
        export,
        low=START_LOW * other + computing * steps.low_seconds / steps.seconds + checkpoints,
        high=START_HIGH * (other + checkpoints) + computing * steps.high_seconds / steps.seconds,
    )


def count_checkpoints(training: TrainingSettings, number: int, seconds: float) -> int:
    """Return the checkpoints of a training of so many steps that takes so many seconds, as its settings ask for."""
    if not training.use_checkpoints or training.save_strategy == "no":
        return 0
    if training.is_given("save_steps"):
        return math.ceil(number / find_interval(training.save_steps, number))
    if training.is_given("save_strategy") and training.save_strategy == "epoch":
        return max(1, math.ceil(training.num_train_epochs))
    return min(number, max(CHECKPOINTS_A_RUN, math.ceil(seconds / SECONDS_BETWEEN)))


def count_evaluations(training: TrainingSettings, number: int) -> int:
    """Return the evaluations of a training of so many steps with rows to evaluate, as its settings ask for."""
    if training.is_given("eval_strategy") and training.eval_strategy == "no":
        return 0
    if training.eval_steps:
        return math.floor(number / find_interval(training.eval_steps, number))
    return math.ceil(training.num_train_epochs)


def find_interval(steps: float, number: int) -> float:
    """Return an interval in steps. Below 1 it is a share of the whole training."""
    return max(1.0, steps * number if steps < 1 else steps)


def time_start(host: InstanceType, count: int, base_bytes: int, tokens: int) -> float:
    """Return the seconds before the first step, from the moment on from which they are billed.

    The image is pulled, the model downloaded and read, and all hosts share the tokenizing.
    """
    model = base_bytes / find_download_rate(host) + base_bytes / DISK_BYTES
    return PULL_SECONDS + model + IMPORT_SECONDS + tokens / (TOKENS_A_VCPU * host.num_vcpus * count)


def find_download_rate(host: InstanceType) -> float:
    """Return the bytes a second that a host exchanges with S3."""
    return min(DOWNLOAD_BYTES, host.network_bandwidth)
