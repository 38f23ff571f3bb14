# SPDX-License-Identifier: Apache-2.0
"""Lines of a job's log for whoever watches it. On a terminal a bar below them shows the progress."""

import os
import re
from typing import TYPE_CHECKING, Self

from llm_trainer.common import log

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table

PROGRESS = re.compile(
    r"^(?:\[[\w-]+\] )?Progress: step (\d+) of (\d+) \(\d+ %\); (.*)$"
)  # training/progress.py writes it


class Screen:
    """The place where lines are shown, within its context."""

    def __init__(self) -> None:
        """Begin without a bar."""
        self.terminal = log.find_terminal()
        self.live: Live | None = None

    def __enter__(self) -> Self:
        """Take over the last lines of a terminal, where there is one."""
        if self.terminal.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown"):
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self.terminal, soft_wrap=True, highlight=False, markup=False, emoji=False)
            self.live = Live(console=console, auto_refresh=False)
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Give the terminal back."""
        if self.live:
            self.live.stop()

    def show(self, line: str) -> None:
        """Show a line, without what could steer a terminal. One on progress draws the bar anew."""
        text = log.show_plainly(line)
        if self.live is None:
            self.terminal.write(f"{text}\n")
            self.terminal.flush()
        elif match := PROGRESS.match(text):
            self.live.update(draw_progress(int(match[1]), int(match[2]), match[3]), refresh=True)
        else:
            self.live.console.print(text)


def draw_progress(step: int, total: int, text: str) -> "Table":
    """Return a bar for a step out of all, with the text beside it."""
    from rich.progress_bar import ProgressBar
    from rich.table import Column, Table

    row = Table.grid(Column(no_wrap=True), Column(ratio=1), Column(no_wrap=True), padding=(0, 1), expand=True)
    row.add_row(f"step {step} of {total}", ProgressBar(total=max(1, total), completed=step), text)
    return row
