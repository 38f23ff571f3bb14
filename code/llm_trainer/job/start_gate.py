# SPDX-License-Identifier: Apache-2.0
"""The gate between preparation and training: a host's workers pass it, or its launcher closes it.

A stop before the gate loses nothing, and the launcher ends its workers wherever they are. After the gate the workers
obey a stop themselves: they save. A file tells the two apart, and whoever creates it first decides. No step is trained
without the workers of every host.
"""

import time
from pathlib import Path


class StartGate:
    """The gate of one host, for one attempt."""

    def __init__(self, scratch_dir: Path) -> None:
        self.file = scratch_dir / "gate"

    def reset(self) -> None:
        """Open the gate for another attempt."""
        self.file.unlink(missing_ok=True)

    def close(self) -> bool:
        """Close the gate for the launcher. Return False where the workers have passed already."""
        return self.claim()

    def wait_or_pass(self) -> None:
        """Pass as the host's first worker, or wait for the end that the launcher is about to bring."""
        while not self.claim():
            time.sleep(1)

    def claim(self) -> bool:
        """Create the file. Return False where it was there."""
        try:
            self.file.touch(exist_ok=False)
        except FileExistsError:
            return False
        return True
