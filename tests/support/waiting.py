# SPDX-License-Identifier: Apache-2.0
"""Waiting for what a test expects, never for a time: a busy machine may take as long as it needs."""

import time
from collections.abc import Callable

GUARD_SECONDS = 500  # ends only what hangs; pytest's own limit, in pyproject.toml, is a little longer


def wait_until(condition: Callable[[], object]) -> None:
    """Return when the condition holds. Raises AssertionError if it never does."""
    deadline = time.monotonic() + GUARD_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for does not come"
        time.sleep(0.05)
