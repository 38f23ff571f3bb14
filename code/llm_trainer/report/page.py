# SPDX-License-Identifier: Apache-2.0
"""The report of a job, output/data/report.html: one page that needs no network, with the curves as JSON and PNG beside.

Apache ECharts draws the charts (assets/README.md). The report is made from the journal; what that lacks is left out.
"""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined

from llm_trainer.common.files import write_verbatim
from llm_trainer.common.units import show_bytes, show_count, show_duration, show_large, show_number, show_share
from llm_trainer.journal.records import GenerationRecord
from llm_trainer.report.advice import find_advice
from llm_trainer.report.charts import (
    GPU_CHARTS,
    HOST_CHARTS,
    Chart,
    Clock,
    describe_supervision,
    draw_curves,
    draw_devices,
    draw_lengths,
    draw_timeline,
)
from llm_trainer.report.curve_image import write_image
from llm_trainer.report.history import History, read_history
from llm_trainer.report.pictures import Thumbnails

PAGE = files("llm_trainer.report") / "assets"
OUTCOMES = {"done": "Done", "stopped": "Stopped", "failed": "Failed"}
# Title -> the metrics whose last value is shown: the first that was logged.
FIGURES = {
    "Training loss": ("train_loss",),
    "Evaluation loss": ("eval_loss",),
    "Reward": ("eval_reward", "reward"),
    "Pairs ranked right": ("eval_rewards/accuracies", "rewards/accuracies"),
    "Token accuracy": ("eval_mean_token_accuracy", "train_token_accuracy"),
}
MAX_GENERATIONS = 20
SHOWN_STEPS = 3  # at the beginning and at the end, of those whose completions are known
MAX_TEXT = 5000  # characters of a generation, since one that never ended would make the page too large
TEXTS: tuple[Literal["split", "prompt", "reference", "before", "after"], ...] = (
    "split",
    "prompt",
    "reference",
    "before",
    "after",
)


def write_report(journal: Path, data_dir: Path) -> None:
    """Write report.html, curves.json and curves.png to `data_dir`. Files that are there are replaced at once."""
    history = read_history(journal)
    clock = Clock(history.first_time, history.duration)
    curves = list(draw_curves(history))
    data_dir.mkdir(parents=True, exist_ok=True)
    page = render_page(history, clock, curves)
    # As it is, since the journal has no secrets and a browser runs scripts only by their digest. A generation may hold
    # half of a surrogate pair.
    write_verbatim(data_dir / "report.html", page, errors="backslashreplace")
    write_verbatim(data_dir / "curves.json", json.dumps(list_curves(history), separators=(",", ":"), allow_nan=False))
    write_image(curves, data_dir / "curves.png")


def render_page(history: History, clock: Clock, curves: list[Chart]) -> str:
    """Return the page as HTML."""
    groups = {
        "curves": curves,
        "gpus": list(draw_devices(history, clock, GPU_CHARTS)),
        "hosts": list(draw_devices(history, clock, HOST_CHARTS)),
        "lengths": list(draw_lengths(history)),
        "timeline": list(draw_timeline(history, clock)),
    }
    scripts = [read_asset("echarts.min.js"), read_asset("report.js")]
    page = build_environment(clock).from_string(read_asset("report.html"))
    return page.render(
        history=history,
        clock=clock,
        outcome=OUTCOMES.get(history.end.get("status", ""), "Unfinished"),
        facts=list(list_facts(history)),
        instances=list(list_instances(history.manifest.get("planned_and_actual") or {})),
        advice=find_advice(history),
        groups=groups,
        drawings={chart.name: chart.describe_drawing() for charts in groups.values() for chart in charts},
        supervision=describe_supervision(history),
        **list_rows(history),
        completions=list(list_completions(history)),
        settings=list_settings(history),
        unset=sorted(name for name, value in history.settings.items() if value is None),
        versions=list_versions(history),
        style=read_asset("report.css"),
        scripts=scripts,
        script_hashes=[compute_script_hash(script) for script in scripts],
    )


def build_environment(clock: Clock) -> Environment:
    """Return the templates' environment, with the filters that show numbers."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    environment.filters |= {"count": show_count, "large": show_large, "duration": show_duration, "elapsed": clock.read}
    return environment


def read_asset(name: str) -> str:
    """Return a file of the page as text."""
    return (PAGE / name).read_text(encoding="utf-8")


def compute_script_hash(script: str) -> str:
    """Return a script's hash, by which a Content-Security-Policy names a script that may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def list_facts(history: History) -> Iterator[tuple[str, str]]:
    """Yield title and text of the figures that a person asks for first, as far as the job got."""
    if history.step:
        is_cut = history.step < history.total_steps
        yield "Steps", show_count(history.step) + (f" of {show_count(history.total_steps)}" if is_cut else "")
    for title, names in FIGURES.items():
        last = next((last for name in names if (last := history.find_metric(name).last) is not None), None)
        if last is not None:
            yield title, show_share(last) if "accurac" in names[0] else show_number(last)
    if history.tokens:
        yield "Tokens", show_large(history.tokens)
    speed = history.find_metric("tokens_per_second")
    if speed:
        yield "Tokens a second", show_number(speed.mean)
    yield from list_comparison(history.manifest.get("planned_and_actual") or {})
    export = history.manifest.get("export") or {}
    if export.get("proven") is False:
        yield "Result", f"not proven: {export.get('reason')}"
    if history.duration:
        yield "Duration", show_duration(history.duration)
    if history.instance_hours is not None:
        yield "Instance hours", f"{history.instance_hours:,.2f}"
    if len(history.attempts) > 1:
        yield "Attempts", str(len(history.attempts))


def list_comparison(compared: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield title and text of what was planned beside what the job took, up to its export."""
    planned, actual = compared.get("planned") or {}, compared.get("actual") or {}
    shown: dict[str, tuple[str, Callable[[float], str]]] = {
        "memory_bytes": ("Memory", show_bytes),
        "step_seconds": ("A step", lambda seconds: f"{seconds:.3g} s"),
        "hours": ("Hours", lambda hours: f"{hours:.3g}"),
        "dollars": ("Cost", lambda dollars: f"{dollars:,.2f}"),
    }
    for name, (title, show) in shown.items():
        if planned.get(name) is not None and actual.get(name) is not None:
            yield f"{title}, planned and actual", f"{show(planned[name])}, {show(actual[name])}"


def list_instances(compared: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield a row for each group of instances: what the job took on its own, and would take on those that matter.

    The cells are why it is told, the instances, hours, their range, and the cost where prices are known.
    """
    actual, chosen = compared.get("actual") or {}, compared.get("instances") or {}
    if not chosen:
        return
    own = f"{compared.get('count')} x {compared.get('instance_type')}"
    yield "This job", own, show_hours(actual.get("hours")), "", show_dollars(actual.get("dollars"))
    for name, title in {"cheapest": "Cheapest", "fastest": "Fastest", "best_value": "Best value"}.items():
        each = chosen.get(name) or {}
        if each:
            ends = (show_hours(each.get(end)) for end in ("hours_at_least", "hours_at_most"))
            place = f"{each.get('count')} x {each.get('instance_type')}"
            yield title, place, show_hours(each.get("hours")), " to ".join(ends), show_dollars(each.get("dollars"))


def show_hours(hours: float | None) -> str:
    """Return hours as a text, empty where they are not known."""
    return "" if hours is None else f"{hours:.2f}"


def show_dollars(dollars: float | None) -> str:
    """Return an amount as a text, empty where no price is known."""
    return "" if dollars is None else f"{dollars:,.2f}"


def list_settings(history: History) -> list[tuple[str, str]]:
    """Return the settings that have a value, by name."""
    return [(name, show_setting(value)) for name, value in sorted(history.settings.items()) if value is not None]


def show_setting(value: Any) -> str:
    """Return a text as it is, and any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def list_versions(history: History) -> list[tuple[str, str]]:
    """Return what the image and the machine are, then the versions of packages."""
    environment = history.job.get("environment") or {}
    packages = {**(history.manifest.get("versions") or {}), **(environment.get("packages") or {})}
    image = {name: value for name, value in environment.items() if name != "packages" and value not in (None, [])}
    if "gpus" in image:
        image["gpus"] = ", ".join(f"{number} x {name}" for name, number in Counter(image["gpus"]).items())
    return [(name, show_setting(value)) for name, value in [*image.items(), *sorted(packages.items())]]


def list_rows(history: History) -> dict[str, list[dict[str, Any]]]:
    """Return the rows and the generations that the page shows. Their thumbnails share its room."""
    thumbnails = Thumbnails()
    return {
        "samples": list(list_samples(history, thumbnails)),
        "generations": list(list_generations(history, thumbnails)),
    }


def list_samples(history: History, thumbnails: Thumbnails) -> Iterator[dict[str, Any]]:
    """Yield name, text and images of a row with images of each split that has one."""
    for name, record in history.data.items():
        if sample := record.get("sample"):
            text = shorten_text(str(sample.get("text") or ""))
            yield {"split": name, "text": text, "images": thumbnails.describe(sample.get("images"))}


def list_generations(history: History, thumbnails: Thumbnails) -> Iterator[dict[str, Any]]:
    """Yield texts and images of the first generations."""
    for record in history.generations[:MAX_GENERATIONS]:
        yield {**shorten_texts(record), "images": thumbnails.describe(record.get("images"))}


def shorten_texts(generation: GenerationRecord) -> dict[str, str]:
    """Return a generation's texts, cut where they are too long for the page."""
    return {name: shorten_text(str(generation.get(name) or "")) for name in TEXTS}


def shorten_text(text: str) -> str:
    """Return a text, cut where it is too long for the page."""
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ..."


def list_completions(history: History) -> Iterator[dict[str, Any]]:
    """Yield completions of the first and the last steps that have any, with their rewards as texts."""
    records = history.completions
    chosen = records if len(records) <= 2 * SHOWN_STEPS else [*records[:SHOWN_STEPS], *records[-SHOWN_STEPS:]]
    for record in chosen:
        for each in record.get("completions") or ():
            rewards = {**(each.get("rewards") or {}), "advantage": each.get("advantage")}
            shown = {name: "none" if value is None else show_number(value) for name, value in rewards.items()}
            yield {
                "step": record.get("step", 0),
                "prompt": str(each.get("prompt") or ""),
                "completion": str(each.get("completion") or ""),
                "rewards": "\n".join(f"{name}: {value}" for name, value in shown.items()),
            }


def list_curves(history: History) -> dict[str, Any]:
    """Return every metric by step, thinned. All values are in metrics.jsonl."""
    return {
        name: {
            "step": [round(bucket.x, 1) for bucket in series.buckets],
            "mean": [bucket.mean for bucket in series.buckets],
            "low": [bucket.low for bucket in series.buckets],
            "high": [bucket.high for bucket in series.buckets],
        }
        for name, series in history.metrics.items()
    }
