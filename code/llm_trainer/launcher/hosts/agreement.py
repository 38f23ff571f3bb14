# SPDX-License-Identifier: Apache-2.0
"""Facts that all hosts of a job must have alike: the version of the image, the number of workers, the settings.

SageMaker gives all hosts the same. Elsewhere each has a command line of its own, and would train a model of its own.
"""

import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from llm_trainer import __version__
from llm_trainer.config.schema import show_value

VERSION, PROCESSES = "the image's version", "the number of workers"


def list_facts(settings: Mapping[str, Any], num_processes: int) -> dict[str, str]:
    """Return what this host has of all that must be alike, by name, for a sentence. Folders may differ."""
    shown = {name: show_value(value) for name, value in settings.items() if not str(value).startswith("/")}
    return {VERSION: __version__, PROCESSES: str(num_processes), **shown}


def digest_facts(facts: Mapping[str, str]) -> dict[str, str]:
    """Return the facts as hosts tell each other: no value crosses the network."""
    return {name: digest(value) for name, value in facts.items()}


@functools.cache  # the first host compares again and again while it waits for others
def digest(value: str) -> str:
    """Return a fact without its value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def find_disagreement(own: str, facts: Mapping[str, str], others: Mapping[str, Mapping[str, str]]) -> str | None:
    """Return a sentence about the hosts that have something else than this one, None where all agree.

    `others` are the digests that each of the other hosts has told; one that told none is passed over.
    """
    digests = digest_facts(facts)
    for host, told in others.items():
        differing = [name for name in {**digests, **told} if told and told.get(name) != digests.get(name)]
        if differing:
            here = ", ".join(f"{name} ({facts.get(name, 'not given')} on {own})" for name in differing)
            return f"Host {host} differs from {own} in {here}: give all hosts of the job the same image and settings."
    return None
