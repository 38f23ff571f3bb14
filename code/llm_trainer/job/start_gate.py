# SPDX-License-Identifier: Apache-2.0
"""Between preparation and training: a host's workers pass a gate, or its launcher closes it. No torch.

A stop before the gate loses nothing, so the launcher ends its workers wherever they are. A stop behind it is the
workers' affair: they save. A file tells the two apart: who creates it first decides, and no step can be trained without
the workers of every host.
"""

import time
from pathlib import Path


class StartGate:
    """One host's, for one attempt."""

    def __init__(self, scratch_dir: Path) -> None:
        self.file = scratch_dir / "gate"

    def reset(self) -> None:
        """Another attempt begins."""
        self.file.unlink(missing_ok=True)

    def close(self) -> bool:
        """Whether the launcher was first: no worker will pass."""
        return self.is_first()

    def wait_or_pass(self) -> None:
        """For the host's first worker: pass, or wait for the end that the launcher is about to bring."""
        while not self.is_first():
            time.sleep(1)

    def is_first(self) -> bool:
        try:
            self.file.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
