# SPDX-License-Identifier: Apache-2.0
"""The plan of a job on instance types as text: one screen, with a table that a terminal shows in colour."""

import io
import shutil
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from llm_trainer.cli.validation import format_table
from llm_trainer.common.units import GIB, show_number

if TYPE_CHECKING:
    from llm_trainer.planning.candidates import Candidate, Outline

MAX_ROWS = 16  # instance types in the table
MAX_NAMES = 4  # of instance types in a sentence
LEAST_FIRST = ("steps", "batch", "GiB a GPU", "range", "tokens/s", "instance-hours")  # what a narrow terminal lacks
TITLES = {"cheapest": "cheapest", "fastest": "fastest", "best_value": "best value (price x hours)"}


def format_plan(
    candidates: "list[Candidate]", chosen: "Mapping[str, Candidate]", outline: "Outline", in_colour: bool
) -> Iterator[str]:
    """Yield lines: the cheapest number of each type, the three candidates that matter, and what the figures rest on."""
    from llm_trainer.planning.choice import find_unable_gpus

    types: dict[str, Candidate] = {}
    for candidate in candidates:
        types.setdefault(candidate.host.name, candidate)
    fitting = [candidate for candidate in types.values() if candidate.fits]
    rows = {f"{each.count} x {each.host.name}": describe_row(each) for each in fitting[:MAX_ROWS]}
    rows = leave_out_columns(rows, find_width())
    yield from format_in_colour(rows) if in_colour else format_table(rows, "instances")
    hidden, unfit = len(fitting) - len(rows), len(types) - len(fitting)
    yield f"Each type in its cheapest number; {hidden} more types fit, {unfit} do not: --json lists 1 to 16 of each."
    yield from find_unable_gpus(candidates)
    yield ""
    for name, title in TITLES.items():
        if name in chosen:
            yield from format_choice(title, chosen[name], outline)
    missing = [candidate.host.name for candidate in fitting if not candidate.offered]
    if missing and outline.prices:
        yield f"No price in {outline.prices.region} (not offered there, or not in the file): {list_some(missing)}."
    yield from format_notes(outline, any(candidate.by_formula for candidate in fitting))


def find_width() -> int | None:
    """Return the columns of the terminal; None where the text goes elsewhere, and may be as wide as it is."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def leave_out_columns(rows: dict[str, dict[str, str]], width: int | None) -> dict[str, dict[str, str]]:
    """Return a table that is no wider than so many columns, as far as the least of its columns can be left out."""
    for column in LEAST_FIRST:
        if width is None or len(next(format_table(rows, "instances"))) <= width:
            break
        rows = {name: {title: cell for title, cell in cells.items() if title != column} for name, cells in rows.items()}
    return rows


def list_some(names: list[str]) -> str:
    """Return the first names, and how many more there are."""
    more = len(names) - MAX_NAMES
    return f"{', '.join(names[:MAX_NAMES])}{f' and {more} more' if more > 0 else ''}"


def describe_row(candidate: "Candidate") -> dict[str, str]:
    """Return the cells of a candidate that fits, by the names of their columns."""
    assert candidate.fit is not None
    run, training = candidate.run, candidate.fit.scenario.settings.training
    rows, pieces = training.per_device_train_batch_size, training.gradient_accumulation_steps
    cells = {
        "how": show_plan(candidate),
        "batch": f"{rows}x{candidate.num_gpus}x{pieces}",
        "GiB a GPU": f"{candidate.fit.need.total_bytes / GIB:.1f}",
        "tokens/s": show_number(candidate.tokens_per_second) if candidate.tokens_per_second else "",
    }
    if run and candidate.instance_hours is not None:
        cells |= {
            "steps": f"{candidate.steps:,}",
            "hours": f"{run.hours:.2f}",
            "range": f"{run.low / 3600:.2f} to {run.high / 3600:.2f}",
            "instance-hours": f"{candidate.instance_hours:.2f}",
        }
    if candidate.dollars is not None and candidate.spot_dollars is not None:
        cells |= {"on demand": f"{candidate.dollars:,.2f}", "spot": f"{candidate.spot_dollars:,.2f}"}
    elif not candidate.offered:
        cells |= {"on demand": "no price"}
    return cells


def show_plan(candidate: "Candidate") -> str:
    """Return the way to train in a few letters, such as `FSDP, recompute 60/80`."""
    assert candidate.fit is not None
    plan = candidate.fit.plan
    words = ["FSDP" if plan.sharded else "DDP" if candidate.num_gpus > 1 else "one GPU"]
    if plan.recompute_activations:
        recomputed = f" {plan.num_layers - plan.kept_layers}/{plan.num_layers}" if plan.kept_layers else ""
        words.append(f"recompute{recomputed}")
    words += ["offload"] * plan.offload_activations
    return ", ".join(words)


def format_in_colour(rows: dict[str, dict[str, str]]) -> Iterator[str]:
    """Yield the lines of a rich table."""
    from rich.console import Console
    from rich.table import Table

    columns = list(next(iter(rows.values())))
    table = Table("instances", box=None, header_style="bold", row_styles=["", "dim"])
    for column in columns:
        table.add_column(column, justify="left" if column == "how" else "right", no_wrap=True)
    for name, cells in rows.items():
        table.add_row(name, *(cells.get(column, "") for column in columns))
    width = max(shutil.get_terminal_size().columns, 130)  # a narrow terminal wraps lines, and cuts no figures
    text = io.StringIO()
    Console(file=text, force_terminal=True, width=width).print(table)
    yield from text.getvalue().splitlines()


def format_choice(title: str, candidate: "Candidate", outline: "Outline") -> Iterator[str]:
    """Yield two lines about a candidate: what it takes, and the settings to use."""
    from llm_trainer.planning.choice import list_settings

    parts = [f"{candidate.count} x {candidate.host.name}"]
    if candidate.run:
        parts.append(f"{candidate.run.hours:.2f} h ({candidate.run.low / 3600:.2f} to {candidate.run.high / 3600:.2f})")
    if candidate.dollars is not None and outline.prices:
        spot = f" ({candidate.spot_dollars:,.2f} on spot)" if candidate.spot_dollars is not None else ""
        parts.append(f"{candidate.dollars:,.2f} {outline.prices.currency}{spot}")
    yield f"{title}: {', '.join(parts)}"
    settings = (f"{name}={str(value).lower()}" for name, value in list_settings(candidate).items())
    yield f"  {' '.join(settings)}"


def format_notes(outline: "Outline", by_formula: bool) -> Iterator[str]:
    """Yield lines on what the figures rest on, and on what is missing for more of them."""
    from llm_trainer.planning.instances import read_instances

    if by_formula:
        yield "The model's code cannot be followed without numbers: its memory and speed are by formula, and less sure."
    yield f"From {read_instances().origin}" + (f"; {outline.prices.origin}." if outline.prices else ".")
    if outline.work is None:
        yield "For hours give --rows and --tokens-per-row, or the channel train (--data-dir)."
    elif outline.prices is None:
        yield "For dollars give --prices (asks AWS), or --prices-file; cheapest stands for the fewest instance-hours."
    else:
        yield "Spot counts interruptions at 40 % a month, and the saving of the price file, or else an assumed 50 %."
