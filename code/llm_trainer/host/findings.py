# SPDX-License-Identifier: Apache-2.0
"""Facts that `doctor`, `validate` or the launcher tells, each with its verdict and its form on a line."""

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from llm_trainer.common import log

Verdict = Literal["ok", "warning", "error"]

COLOURS = {"ok": "\033[32m", "warning": "\033[33m", "error": "\033[31m"}


@dataclass(frozen=True)
class Finding:
    """A fact with its verdict.

    A warning means a slower or less certain job, an error a job that fails. Their text ends with what to change.
    """

    subject: str
    verdict: Verdict
    text: str


def wants_colours() -> bool:
    """Tell whether standard output is a terminal whose user has not refused colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def format_finding(finding: Finding, in_colour: bool) -> str:
    """Return a finding as a line: subject, verdict and text."""
    verdict = f"{finding.verdict:8}"
    if in_colour:
        verdict = f"{COLOURS[finding.verdict]}{verdict}\033[0m"
    return f"{finding.subject:14} {verdict} {finding.text}"


def log_findings(findings: Iterable[Finding]) -> None:
    """Log what is found of this machine, a line each."""
    log.info(*(f"Machine: {finding.verdict}: {finding.subject}: {finding.text}" for finding in findings))
