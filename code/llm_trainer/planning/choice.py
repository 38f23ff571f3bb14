# SPDX-License-Identifier: Apache-2.0
"""The three candidates that matter, and the settings with which a job gets there what was planned."""

from collections.abc import Iterable, Iterator
from typing import Any

from llm_trainer.planning.candidates import Candidate
from llm_trainer.planning.fitting import find_elsewhere
from llm_trainer.planning.instances import InstanceType


def choose(candidates: Iterable[Candidate]) -> dict[str, Candidate]:
    """Return the cheapest candidate that fits, the fastest, and the best value, by these names.

    Types that are not offered come into question only where no other fits. The best value has the least product of
    price and hours: a job may cost twice as much where it takes half the time. Without hours only the cheapest is
    known, and nothing comes back where no candidate fits.
    """
    fitting = [candidate for candidate in candidates if candidate.fits]
    fitting = [candidate for candidate in fitting if candidate.offered] or fitting
    if not fitting:
        return {}
    timed = [candidate for candidate in fitting if candidate.run]
    cheapest = min(fitting, key=lambda candidate: candidate.order)
    if not timed:
        return {"cheapest": cheapest}
    return {"cheapest": cheapest, "fastest": min(timed, key=find_hours), "best_value": min(timed, key=weigh_value)}


def find_hours(candidate: Candidate) -> float:
    """Return the hours of a candidate that is timed."""
    return candidate.run.hours if candidate.run else 0.0


def weigh_value(candidate: Candidate) -> float:
    """Return what a good value has little of: the product of price and hours."""
    return find_hours(candidate) * (find_price(candidate) or 0.0)


def find_price(candidate: Candidate) -> float | None:
    """Return the dollars of a candidate, or the hours of its instances where no price is known."""
    return candidate.instance_hours if candidate.dollars is None else candidate.dollars


def find_unable_gpus(candidates: Iterable[Candidate]) -> Iterator[str]:
    """Yield a sentence for each thing that the settings ask for and GPUs cannot do, with their instance types."""
    refusals: dict[InstanceType, set[str]] = {}
    for candidate in candidates:
        told = candidate.refusal.replace(str(find_elsewhere(candidate.host.gpu)), "such a GPU")  # the same of all
        refusals.setdefault(candidate.host, set()).add("" if candidate.fit else told)
    unable: dict[str, list[InstanceType]] = {}
    for host, texts in refusals.items():
        if len(texts) == 1 and "" not in texts:  # whatever their number
            unable.setdefault(texts.pop().rstrip("."), []).append(host)
    for text, hosts in unable.items():
        able = {host.family for host in refusals.keys() - {*hosts}}
        names = {f"{host.name if host.family in able else host.family} ({host.gpu.name})": None for host in hosts}
        yield f"Out for their GPUs: {', '.join(names)}: {text}."


def describe_choice(candidate: Candidate) -> dict[str, Any]:
    """Return a chosen candidate as values of JSON, with the settings to use."""
    return {**candidate.describe(), "settings": list_settings(candidate)}


def list_settings(candidate: Candidate) -> dict[str, Any]:
    """Return the settings to use on a candidate, by their names."""
    assert candidate.fit is not None
    plan, training = candidate.fit.plan, candidate.fit.scenario.settings.training
    settings: dict[str, Any] = {
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
    }
    if candidate.num_gpus > 1:
        settings["distribution"] = "fsdp" if plan.sharded else "ddp"
    if not plan.kept_layers:  # which is left open, as the job finds out how many layers it can keep
        settings["gradient_checkpointing"] = plan.recompute_activations
    if plan.offload_activations:
        settings["activation_offloading"] = True
    return settings
