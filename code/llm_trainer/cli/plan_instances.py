# SPDX-License-Identifier: Apache-2.0
"""The part of `llm-trainer plan` about instances: what a job takes on each type, in time and dollars."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.plan_table import format_plan
from llm_trainer.cli.validation import Validation
from llm_trainer.common.errors import UserError, cut_quote
from llm_trainer.config.environment import read_environment

if TYPE_CHECKING:
    from llm_trainer.data.images.row_images import RowImages
    from llm_trainer.model.memory.scenario import MemoryScenario
    from llm_trainer.planning.candidates import Candidate, Outline
    from llm_trainer.planning.learning import Learnt
    from llm_trainer.planning.prices import Prices


IMAGES = r"[1-9]\d?x[1-9]\d{0,3}x[1-9]\d{0,3}"  # of a row: their number, width and height


@dataclass(frozen=True)
class PlanOptions:
    """The options of `llm-trainer plan` that are no settings."""

    rows: int | None = None  # of an epoch
    tokens_per_row: int | None = None
    images_per_row: str | None = None  # number and size, as in 2x1280x960
    asks_prices: bool = False
    prices_file: str | None = None
    region: str | None = None
    learn_from: list[str] = field(default_factory=list)  # manifests of jobs that have ended
    in_colour: bool = False  # whether the text may have colours
    places: tuple[tuple[str, int], ...] | None = None  # the types and numbers that are asked about; None: all


NO_OPTIONS = PlanOptions()


@dataclass(frozen=True)
class Lengths:
    """The number of sequences of each length in tokens; a pair has two. Empty: nothing is known of them."""

    train: Counter[int] = field(default_factory=Counter)
    validation: Counter[int] = field(default_factory=Counter)
    longest_row: int | None = None  # where data are there
    scored_share: float = 1.0  # of all tokens, those that predict a label
    images: "RowImages | None" = None  # of the row with the most; None without


@dataclass(frozen=True)
class Basis:
    """Prices and lessons that a plan takes over from files and from AWS."""

    prices: "Prices | None"
    learnt: "Learnt"


def read_basis(options: PlanOptions, validation: Validation) -> Basis | None:
    """Return what the options name, None where something is wrong with them, after adding all of that.

    AWS is asked for prices only where nothing else is wrong with the job.
    """
    from llm_trainer.planning.learning import Learnt, learn

    validation.add_findings("options", "error", find_row_problems(options))
    learnt, prices = Learnt(), None
    try:
        learnt = learn(options.learn_from)
        validation.add_findings("options", "ok", learnt.describe())
        validation.add_findings("options", "warning", learnt.find_warnings())
    except UserError as error:
        validation.add_findings("options", "error", error.problems)
    if options.asks_prices and validation.list_texts("error"):
        return None
    try:
        prices = read_job_prices(options, validation)
    except UserError as error:
        validation.add_findings("options", "error", error.problems)
    return None if validation.list_texts("error") else Basis(prices, learnt)


def find_row_problems(options: PlanOptions) -> Iterator[str]:
    """Yield a sentence where rows that stand for data are not whole."""
    given = [options.rows, options.tokens_per_row]
    if any(number is not None for number in given) and not all(number is not None and number > 0 for number in given):
        yield "--rows and --tokens-per-row stand for data together: give both, as whole numbers above zero."
    if options.images_per_row is not None and not re.fullmatch(IMAGES, options.images_per_row):
        yield (
            f"--images-per-row={cut_quote(options.images_per_row)!r} is no number and size of images: write "
            "NUMBERxWIDTHxHEIGHT, such as 1x1280x960."
        )


def examine_instances(outline: "Outline", validation: Validation, in_colour: bool) -> None:
    """Add what the job takes on each instance type."""
    if outline.fitter.job.settings.parallelism.use_cpu:
        text = "use_cpu=true: what instance types without a GPU take is not known."
        validation.add_findings("instances", "warning", [text])
        return
    add_candidates(outline, validation, in_colour)


def add_candidates(outline: "Outline", validation: Validation, in_colour: bool) -> None:
    """Add every instance type, one to sixteen of it, and the three that matter; or the places that are asked about."""
    from llm_trainer.planning.candidates import list_candidates
    from llm_trainer.planning.choice import choose, describe_choice, find_unable_gpus
    from llm_trainer.planning.instances import read_instances

    candidates = list_candidates(outline)
    chosen, prices = choose(candidates), outline.prices
    validation.instances = {
        "instances": [candidate.describe() for candidate in candidates],
        **{name: describe_choice(candidate) for name, candidate in chosen.items()},
        "facts": read_instances().origin,
        "prices": prices.origin if prices else None,
        "currency": prices.currency if prices else None,
    }
    if not chosen and outline.places is not None:
        return  # who asks about these tells by itself which of them do not fit
    if not chosen:
        validation.add_findings("instances", "error", [explain_lack(candidates)])
        validation.add_findings("instances", "warning", find_unable_gpus(candidates))
        return
    validation.instance_lines = list(format_plan(candidates, chosen, outline, in_colour))


def explain_lack(candidates: "list[Candidate]") -> str:
    """Return a sentence on a job that fits nowhere, with the changes that make it fit where it almost does."""
    from llm_trainer.model.memory.fit import describe_remedies

    refused = [(candidate, candidate.fit) for candidate in candidates if candidate.fit]
    if not refused:
        return f"No instance type can run the job: {candidates[0].refusal.rstrip('.')}."
    candidate, fit = min(refused, key=lambda each: each[1].need.total_bytes / each[1].scenario.target.free_bytes)
    where = f"on {candidate.count} x {candidate.host.name}, which come closest, it {candidate.refusal}"
    return f"The job fits no instance type ({where}); {describe_remedies(fit.scenario)}."


def read_job_prices(options: PlanOptions, validation: Validation) -> "Prices | None":
    """Return the prices to plan with, None where there are none, after warning of old ones and of other regions."""
    from llm_trainer.aws.clients import find_known_region
    from llm_trainer.aws.price_list import choose_prices
    from llm_trainer.planning.prices import find_warnings

    file = Path(options.prices_file) if options.prices_file else None
    prices = choose_prices(options.asks_prices, file, options.region, read_environment().channels.get("config"))
    if prices and not options.asks_prices:
        validation.add_findings("prices", "warning", find_warnings(prices, options.region or find_known_region()))
    return prices


def build_outline(scenario: "MemoryScenario", lengths: Lengths, merges: bool, basis: Basis) -> "Outline":
    """Return the job as it is planned. `merges` tells whether the result has all weights."""
    from llm_trainer.planning.candidates import Outline
    from llm_trainer.planning.fitting import Fitter
    from llm_trainer.planning.workload import measure_work

    counted = lengths.train, lengths.validation, scenario.settings.generation, lengths.scored_share
    work = measure_work(*counted) if lengths.train else None
    return Outline(Fitter(scenario), work, merges, basis.learnt, basis.prices)
