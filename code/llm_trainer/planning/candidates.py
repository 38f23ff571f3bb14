# SPDX-License-Identifier: Apache-2.0
"""Every instance type, one to sixteen of it: whether a job fits, how, and what it takes in time and dollars."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_trainer.common.errors import UserError
from llm_trainer.common.units import GIB, show_bytes
from llm_trainer.model.memory.estimate import count_optimizer_states
from llm_trainer.planning.cost import SpotRun, expect_interruptions
from llm_trainer.planning.fitting import Fit, Fitter
from llm_trainer.planning.instances import InstanceType, read_instances
from llm_trainer.planning.learning import Learnt
from llm_trainer.planning.prices import Prices
from llm_trainer.planning.run_time import RunTime, Sizes, Steps, count_checkpoints, count_evaluations, time_run
from llm_trainer.planning.step_time import StepTime, time_step
from llm_trainer.planning.workload import Workload

MAX_COUNT = 16  # instances of a job
STORED_BYTES = 2  # of a weight in a model's files


@dataclass(frozen=True)
class Outline:
    """A job that is to be planned."""

    fitter: Fitter
    work: Workload | None  # None where nothing is known of its data
    merges: bool  # whether the result has all weights though an adapter is trained
    learnt: Learnt
    prices: Prices | None  # None: not known
    places: tuple[tuple[str, int], ...] | None = None  # the types and numbers that are asked about; None: all

    def list_counts(self, name: str) -> Sequence[int]:
        """Return the numbers of instances of a type that are asked about."""
        if self.places is None:
            return range(1, MAX_COUNT + 1)
        return [count for asked, count in self.places if asked == name]


@dataclass(frozen=True)
class Candidate:
    """A number of instances that a job may run on."""

    host: InstanceType
    count: int
    fit: Fit | None = None
    refusal: str = ""  # why it cannot run there
    offered: bool = True  # False where prices are known, and none for its type: AWS mostly does not offer it there
    step: StepTime | None = None
    steps: int | None = None
    tokens_per_second: float | None = None
    run: RunTime | None = None
    spot: SpotRun | None = None
    dollars: float | None = None
    spot_dollars: float | None = None
    spot_saving: float | None = None  # the share of the price that these rest on
    is_saving_assumed: bool | None = None  # True where the user has told none

    @property
    def fits(self) -> bool:
        """True where the job runs there."""
        return not self.refusal

    @property
    def num_gpus(self) -> int:
        """The number of GPUs in all."""
        return self.count * self.host.num_gpus

    @property
    def instance_hours(self) -> float | None:
        """The hours that are billed, of all instances."""
        return self.run.hours * self.count if self.run else None

    @property
    def how(self) -> str:
        """Words on the way to train, and on the batch: rows or pairs of a GPU x GPUs x batches that are added up."""
        if self.fit is None:
            return ""
        training = self.fit.scenario.settings.training
        rows, pieces = training.per_device_train_batch_size, training.gradient_accumulation_steps
        return f"{self.fit.plan.describe(self.num_gpus)}, batch {rows} x {self.num_gpus} x {pieces}"

    @property
    def by_formula(self) -> bool:
        """True where memory or time follow from a formula, as the model's code does not run without numbers."""
        return bool(self.fit and self.fit.by_formula) or bool(self.step and not self.step.is_traced)

    @property
    def order(self) -> tuple[float, ...]:
        """A key that sorts the cheapest first: by dollars, by hours where no price is known, or by GPUs.

        Those that do not fit stand last, and before them those that are not offered.
        """
        places = (self.dollars, self.instance_hours, float(self.num_gpus))
        place = next(place for place, value in enumerate(places) if value is not None)
        return (not self.fits, not self.offered, place, places[place] or 0.0, self.count)

    def describe(self) -> dict[str, Any]:
        """Return the candidate as values of JSON."""
        run, step = self.run, self.step
        return {
            "instance_type": self.host.name,
            "count": self.count,
            "fits": self.fits,
            "offered": self.offered,
            "how": self.how,
            "gib_per_gpu": round(self.fit.need.total_bytes / GIB, 2) if self.fit else None,
            "tokens_per_second": self.tokens_per_second and round(self.tokens_per_second),
            "hours": run and round(run.hours, 3),
            "dollars": self.dollars and round(self.dollars, 2),
            "gpus": self.num_gpus,
            "gpu": self.host.gpu.name,
            "refusal": self.refusal,
            "steps": self.steps,
            "step_seconds": step and round(step.seconds, 4),
            "hours_at_least": run and round(run.low / 3600, 3),
            "hours_at_most": run and round(run.high / 3600, 3),
            "dollars_an_hour": self.dollars and self.instance_hours and self.dollars / self.instance_hours,
            "instance_hours": self.instance_hours and round(self.instance_hours, 3),
            "spot_dollars": self.spot_dollars and round(self.spot_dollars, 2),
            "spot_saving": self.spot_saving,
            "spot_saving_is_assumed": self.is_saving_assumed,
            "spot_hours": self.spot and round(self.spot.hours, 3),
            "interruptions": self.spot and round(self.spot.interruptions, 4),
            "by_formula": self.by_formula,
        }


def list_candidates(outline: Outline) -> list[Candidate]:
    """Return every instance type, one to sixteen of it, or the places that are asked about.

    Those that fit come first, and of them the cheapest.
    """
    fits: dict[tuple[str, int], Fit | str] = {}
    asked = outline.fitter.job.settings.parallelism.nproc_per_node
    found: list[Candidate] = []
    for host in read_instances().types.values():
        if asked and asked > host.num_gpus:
            refusal = f"nproc_per_node={asked} is more than its GPUs"
            found += [Candidate(host, count, refusal=refusal) for count in outline.list_counts(host.name)]
        else:
            found += try_counts(outline, replace(host, num_gpus=asked or host.num_gpus), fits)
    return sorted(found, key=lambda candidate: candidate.order)


def try_counts(outline: Outline, host: InstanceType, fits: dict[tuple[str, int], Fit | str]) -> Iterator[Candidate]:
    """Yield the numbers of a type that are asked about.

    `fits` keeps what is known of a number of GPUs for other types.
    """
    offered = outline.prices is None or host.name in outline.prices.on_demand
    for count in outline.list_counts(host.name):
        num_gpus = count * host.num_gpus
        key = host.gpu.name, num_gpus
        fit = fits[key] = fits[key] if key in fits else find_fit(outline.fitter, host, num_gpus)
        if isinstance(fit, str):
            yield Candidate(host, count, refusal=fit, offered=offered)
        elif refusal := fit.refusal or find_lack_of_memory(host, fit):
            yield Candidate(host, count, fit, refusal, offered)
        else:
            yield plan_time(outline, Candidate(host, count, fit, offered=offered))


def find_fit(fitter: Fitter, host: InstanceType, num_gpus: int) -> Fit | str:
    """Return how a job fits so many GPUs of a host's kind, or why they cannot do what the settings ask for."""
    try:
        return fitter.fit(host.gpu, num_gpus)
    except UserError as error:
        return " ".join(error.problems)


def find_lack_of_memory(host: InstanceType, fit: Fit) -> str:
    """Return words on what a host's own memory lacks for the activations that wait there; empty where nothing."""
    need = fit.need.host_bytes * host.num_gpus
    return f"needs {show_bytes(need)} of the host's memory for activations" if need > host.memory_bytes else ""


def plan_time(outline: Outline, candidate: Candidate) -> Candidate:
    """Return a candidate that fits with its time, and with its dollars where prices are known."""
    assert candidate.fit is not None
    host, fit, work = candidate.host, candidate.fit, outline.work
    scenario = fit.scenario
    row_tokens = work.row_tokens if work else scenario.length
    if work and not scenario.known_batch:  # a step takes the time of rows of the mean length, and the longest's memory
        scenario = work.fill_batch(scenario)
    step = time_step(host, scenario, fit.plan, candidate.num_gpus, row_tokens)
    if step is None:
        return candidate
    training = scenario.settings.training
    if not scenario.settings.data.generates:  # other jobs' steps tell nothing of how long it takes to write
        step = outline.learnt.correct_step(step, host, scenario.shape)
    batches = candidate.num_gpus * training.gradient_accumulation_steps
    rows = training.per_device_train_batch_size * batches
    tokens_a_second = batches * scenario.batch.num_tokens / step.seconds
    timed = replace(candidate, step=step, tokens_per_second=tokens_a_second)
    return plan_run(outline, timed, rows, work) if work else timed


def plan_run(outline: Outline, candidate: Candidate, rows_a_step: int, work: Workload) -> Candidate:
    """Return a candidate whose steps are timed with its hours, and with its dollars where prices are known."""
    assert candidate.fit is not None
    host, count, fit = candidate.host, candidate.count, candidate.fit
    number = work.count_steps(rows_a_step, fit.scenario.settings.training)
    steps = describe_steps(candidate, number, work)
    run = outline.learnt.correct_start(time_run(host, count, steps, measure_sizes(fit, outline.merges)), host)
    between = run.steps / max(1, steps.checkpoints)
    spot = expect_interruptions(run.hours, run.start / 3600, between / 3600, count)
    prices = outline.prices
    timed = replace(candidate, steps=number, run=run, spot=spot)
    if prices is None or host.name not in prices.on_demand:
        return timed
    return replace(
        timed,
        dollars=prices.on_demand[host.name] * run.hours * count,
        spot_dollars=prices.spot[host.name] * spot.hours * count,
        spot_saving=prices.find_spot_saving(host.name),
        is_saving_assumed=host.name not in prices.spot_savings,
    )


def describe_steps(candidate: Candidate, number: int, work: Workload) -> Steps:
    """Return the steps of a training that has so many, and what a candidate that is timed does beside them."""
    assert candidate.fit is not None and candidate.step is not None and candidate.tokens_per_second is not None
    settings, step = candidate.fit.scenario.settings, candidate.step
    low, high = step.range_seconds
    return Steps(
        number,
        step.seconds,
        low,
        high,
        tokens=work.read_tokens,
        eval_tokens=count_evaluations(settings.training, number) * work.eval_tokens,
        reference_tokens=work.num_tokens + work.eval_tokens if settings.asks_reference_first else 0,
        tokens_per_second=candidate.tokens_per_second,
        checkpoints=count_checkpoints(settings.training, number, number * step.seconds),
        untrained_passes=step.untrained_passes,
        evaluation_passes=step.evaluation_passes,
    )


def measure_sizes(fit: Fit, merges: bool) -> Sizes:
    """Return the bytes that a job reads and writes."""
    shape, scenario = fit.scenario.shape, fit.scenario
    base = STORED_BYTES * (shape.count_weights() - shape.count_weights("adapter"))
    writes_all = merges or not scenario.settings.adapter.use_peft
    return Sizes(
        base=base,
        checkpoint=shape.trained_bytes + count_optimizer_states(shape, scenario.settings.training.optim),
        result=base if writes_all else shape.trained_bytes,
    )
