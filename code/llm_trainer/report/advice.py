# SPDX-License-Identifier: Apache-2.0
"""Advice on what slowed a job down or spoils its result, with the figures that say so, and what to change."""

from collections.abc import Callable, Iterator
from itertools import accumulate
from statistics import median
from typing import NamedTuple

from llm_trainer.common.units import show_count, show_duration, show_share
from llm_trainer.config.global_batch import TOTALS
from llm_trainer.report.history import History

BUSY_GPU = 70.0  # percent of the time
BUSY_CPU = 85.0  # percent of the cores
FULL_MEMORY = 60.0  # percent: below, a batch of half as much again fits
THROTTLED_SHARE = 2.0  # percent of the samples
SLOW_CLOCK = 0.92  # as a share of the median GPU's clock
LONG_START = 0.2  # as a share of the job's duration; a start must exceed both limits
LONG_START_SECONDS = 300
EVALUATION_SHARE = 0.1  # of the training's duration, as the next
CHECKPOINT_SHARE = 0.05
LONG_INTERRUPTION = 60  # seconds in all, since less is not worth a change
PADDING_SHARE = 0.15
CUT_SHARE = 0.01  # of the rows
OVERFIT = 1.02  # as a multiple of the lowest loss of an evaluation
FALLEN = 0.98  # as a share of the loss of the first tenth of the steps
# The advice by the phase of the start that takes longest.
SHORTER_STARTS = {
    "download": "Keep the weights in a channel with FastFile mode, or in a warm pool (KeepAlivePeriodInSeconds).",
    "data": "Tokenized rows are kept in a warm pool's folder: start the next job in one, or give pretokenized rows.",
    "answers_before": "Fewer sample_prompts, or none, answer sooner.",
    "model": "Give the weights as safetensors on the instance's own disk; a warm pool keeps what was downloaded.",
}


class Advice(NamedTuple):
    """A title, the figures that it rests on, and what to change."""

    title: str
    evidence: str
    change: str


def find_advice(history: History) -> list[Advice]:
    """Return all advice on a job: what is wrong first, then what is slow."""
    return [advice for rule in RULES for advice in rule(history)]


def find_lost_numbers(history: History) -> Iterator[Advice]:
    """Advise where a metric was not a number."""
    for name in ("train_loss", "grad_norm"):
        steps = history.find_metric(name).not_finite_at
        if steps:
            times = "100 times or more" if len(steps) == 100 else "Once" if len(steps) == 1 else f"{len(steps)} times"
            yield Advice(
                f"{name} was not a number",
                f"{times}, for the first time at step {steps[0]:,.0f}.",
                "Lower learning_rate, train in bfloat16 instead of float16, and look at the rows of that step.",
            )


def find_overfit(history: History) -> Iterator[Advice]:
    """Advise where the evaluation loss rose again after its lowest point."""
    series = history.find_metric("eval_loss")
    if series.count < 3 or series.last is None:
        return
    best = min(series.buckets, key=lambda bucket: bucket.low)
    if series.last > OVERFIT * best.low and best is not series.buckets[-1]:
        yield Advice(
            "The model overfits",
            f"eval_loss was lowest at step {best.x:,.0f} ({best.low:.4g}) and ended at {series.last:.4g}.",
            "Train for fewer epochs (num_train_epochs), keep the best checkpoint with load_best_model_at_end=true, or "
            "give more varied data.",
        )


def find_flat_loss(history: History) -> Iterator[Advice]:
    """Advise where the training loss did not fall."""
    means = [bucket.mean for bucket in history.find_metric("train_loss").buckets]
    tenth = len(means) // 10
    if not tenth:
        return
    first, last = sum(means[:tenth]) / tenth, sum(means[-tenth:]) / tenth
    if last > FALLEN * first:
        yield Advice(
            "The loss does not fall",
            f"train_loss is {first:.4g} over the first tenth of the steps and {last:.4g} over the last.",
            "Try a learning_rate three times higher or lower, and read a few rows as the chat template renders them.",
        )


def find_cut_rows(history: History) -> Iterator[Advice]:
    """Advise where many rows are cut or left out."""
    parts, longest = [], 0
    for split, record in history.data.items():
        summary = record.get("summary") or {}
        cut = summary.get("num_truncated_rows", 0)
        left_out = summary.get("num_dropped_rows", 0) + summary.get("num_unsupervised_rows", 0)
        rows = left_out + (record.get("rows") or 0)
        if cut + left_out > CUT_SHARE * rows:
            parts.append(
                f"{show_count(cut)} cut and {show_count(left_out)} left out of {show_count(rows)} rows ({split})"
            )
            longest = max(longest, summary.get("longest_row_tokens", 0))
    if parts:
        yield Advice(
            "Rows are cut or left out",
            f"{'; '.join(parts)}. The longest has {show_count(longest)} tokens.",
            "Raise max_length, or split long rows: a model does not learn from what is cut.",
        )


def find_low_utilization(history: History) -> Iterator[Advice]:
    """Advise where GPUs did not compute most of the time."""
    gpus = history.list_devices_in_training("gpu/utilization_percent")
    if not gpus:
        return
    mean = sum(series.mean for series in gpus.values()) / len(gpus)
    if mean >= BUSY_GPU:
        return
    evidence = f"The GPUs computed {mean:.0f}% of the time during the training"
    cpus = history.list_devices_in_training("host/cpu_percent")
    busiest = max(cpus, key=lambda host: cpus[host].mean, default="")
    if busiest and cpus[busiest].mean >= BUSY_CPU:
        yield Advice(
            "GPUs wait for the CPU",
            f"{evidence}, while the CPU of {busiest} was busy {cpus[busiest].mean:.0f}% of it.",
            "Take an instance with more CPU cores for each GPU, or do less while training: streaming=false tokenizes "
            "before the first step.",
        )
    else:
        yield Advice(
            "GPUs wait",
            f"{evidence}, and no CPU was the reason.",
            f"{describe_larger_batch(history)}, or dataloader_num_workers if loading a batch takes long; on several "
            "hosts look at the network, and at a smaller number of GPUs.",
        )


def find_free_memory(history: History) -> Iterator[Advice]:
    """Advise where a larger batch fits into the GPUs."""
    gpus = history.list_devices_in_training("gpu/memory_percent")
    if not gpus:
        return
    fullest = max(gpus, key=lambda gpu: gpus[gpu].high)
    if gpus[fullest].high < FULL_MEMORY:
        batch = history.find_setting("per_device_train_batch_size")
        yield Advice(
            "GPU memory is left unused",
            f"The fullest GPU, {fullest}, never used more than {gpus[fullest].high:.0f}% of its memory"
            + (f", at per_device_train_batch_size={batch}." if batch else "."),
            f"{describe_larger_batch(history)}, or switch gradient_checkpointing off, which takes a third more time, "
            "or half more with an adapter; or take smaller GPUs.",
        )


def describe_larger_batch(history: History) -> str:
    """Return words for what has a GPU take more rows at once. With a global batch it is derived."""
    for name in TOTALS:
        if history.find_setting(name):
            return f"Give a per_device_train_batch_size that takes more of {name} at once, or raise {name}"
    return "Raise per_device_train_batch_size (and lower gradient_accumulation_steps as much)"


def find_throttling(history: History) -> Iterator[Advice]:
    """Advise where GPUs ran at lower clocks for heat, power supply or a fault."""
    gpus = history.list_devices_in_training("gpu/throttled_percent")
    shares = {gpu: series.mean for gpu, series in gpus.items() if series.mean > THROTTLED_SHARE}
    if shares:
        worst = max(shares, key=lambda gpu: shares[gpu])
        yield Advice(
            "GPUs were throttled",
            f"Heat, the power supply or a fault held down the clocks of {len(shares)} of {len(gpus)} GPUs, those of "
            f"{worst} in {shares[worst]:.0f}% of the samples. The power limit, which is normal, is not counted.",
            "Start the job again on another instance.",
        )


def find_slow_gpu(history: History) -> Iterator[Advice]:
    """Advise where one GPU has a lower clock than the others."""
    clocks = {gpu: series.mean for gpu, series in history.list_devices_in_training("gpu/sm_clock_mhz").items()}
    if len(clocks) < 2:
        return
    usual, slowest = median(clocks.values()), min(clocks, key=lambda gpu: clocks[gpu])
    if clocks[slowest] < SLOW_CLOCK * usual:
        yield Advice(
            "One GPU is slower than the others",
            f"{slowest} ran at {clocks[slowest]:,.0f} MHz on average, the median GPU at {usual:,.0f} MHz, and all wait "
            "for it.",
            "Look at its temperature and events below, and start the job again on another instance.",
        )


def find_gpu_errors(history: History) -> Iterator[Advice]:
    """Advise where GPUs reported errors."""
    for metric, name in (("xid_errors", "XID errors"), ("ecc_uncorrected_errors", "memory errors that lost data")):
        counts = {gpu: series.high for gpu, series in history.list_devices(f"gpu/{metric}").items() if series.high}
        if counts:
            yield Advice(
                "GPUs reported errors",
                f"{name}: " + ", ".join(f"{show_count(count)} of {gpu}" for gpu, count in counts.items()) + ".",
                "Read the events below; where the same instance is used again, as in a warm pool, give it up.",
            )


def find_padding(history: History) -> Iterator[Advice]:
    """Advise where much of a batch is padding."""
    packing = history.manifest.get("packing", {})
    batch = history.find_setting("per_device_train_batch_size")
    if packing.get("mode") != "off" or not isinstance(batch, int):
        return
    limit = history.find_setting("max_length") or float("inf")
    train = history.data.get("train")
    lengths = (train.get("lengths") if train else None) or {}
    num_sequences = batch * (train.get("sequences_a_row", 1) if train else 1)
    share = expect_padding({min(int(length), limit): rows for length, rows in lengths.items()}, num_sequences)
    if share > PADDING_SHARE:
        yield Advice(
            "Much of a batch is padding",
            f"By their lengths, {show_share(share)} of a batch of {batch} rows is padding on average; they are not "
            f"packed: {packing.get('reason', '')}.",
            "Let rows share sequences (packing=true, with an attention kernel that keeps them apart), or set "
            "train_sampling_strategy=group_by_length.",
        )


def expect_padding(lengths: dict[float, int], batch: int) -> float:
    """Return the expected share of padding in a batch of random rows.

    It is 1 - mean length / expected longest length. The longest of `batch` independent lengths is an order statistic.
    Its mean is the sum over lengths of length * (F(length)^batch - F(next shorter)^batch).
    F is the share of rows that are at most as long.
    """
    total = sum(lengths.values())
    if not total:
        return 0.0
    ordered = sorted(lengths)
    below = [rows / total for rows in accumulate(lengths[length] for length in ordered)]
    longest = sum(
        length * (share**batch - before**batch)
        for length, share, before in zip(ordered, below, [0.0, *below], strict=False)
    )
    return 1 - sum(length * rows for length, rows in lengths.items()) / total / longest if longest else 0.0


def find_long_start(history: History) -> Iterator[Advice]:
    """Advise where much of the job had passed before the training began."""
    seconds = {
        name: max((phase.seconds for phase in history.phases if phase.name == name), default=0.0)
        for name in SHORTER_STARTS
    }
    start, longest = sum(seconds.values()), max(seconds, key=lambda name: seconds[name])
    if start > LONG_START_SECONDS and start > LONG_START * history.duration:
        yield Advice(
            "The start takes long",
            f"{show_duration(start)} of {show_duration(history.duration)} passed before the training began, "
            f"{show_duration(seconds[longest])} of them with {longest!r}.",
            SHORTER_STARTS[longest],
        )


def find_interruptions(history: History) -> Iterator[Advice]:
    """Advise where evaluations or checkpoints took much of the time."""
    training = history.measure_training()
    evaluation = sum(phase.seconds for phase in history.phases if phase.name == "evaluation")
    checkpoints = sum(record.get("seconds", 0) for record in history.checkpoints)
    if training and evaluation > max(LONG_INTERRUPTION, EVALUATION_SHARE * training):
        yield Advice(
            "Evaluations take long",
            f"{show_duration(evaluation)}, {show_share(evaluation / training)} of the training.",
            "Evaluate less often (eval_steps), on fewer rows, or with a larger per_device_eval_batch_size.",
        )
    if training and checkpoints > max(LONG_INTERRUPTION, CHECKPOINT_SHARE * training):
        yield Advice(
            "Checkpoints take long",
            f"{len(history.checkpoints)} took {show_duration(checkpoints)}, {show_share(checkpoints / training)} of "
            "the training.",
            "Save less often (save_steps), or on a faster disk.",
        )


def find_restarts(history: History) -> Iterator[Advice]:
    """Advise where the job needed several attempts."""
    if len(history.attempts) > 1:
        after = show_duration(history.attempts[-1] - history.first_time)
        yield Advice(
            "The training was restarted",
            f"{len(history.attempts)} attempts; the last one began {after} after the start.",
            "See the events for the reason; with more frequent checkpoints (save_steps) less is repeated.",
        )


RULES: tuple[Callable[[History], Iterator[Advice]], ...] = (
    find_lost_numbers,
    find_flat_loss,
    find_overfit,
    find_cut_rows,
    find_restarts,
    find_gpu_errors,
    find_slow_gpu,
    find_throttling,
    find_low_utilization,
    find_free_memory,
    find_padding,
    find_long_start,
    find_interruptions,
)
