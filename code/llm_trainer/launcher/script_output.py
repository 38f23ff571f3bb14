# SPDX-License-Identifier: Apache-2.0
"""A user's script's output on its way to the log: as it comes, and without secrets. Its metrics are its own affair."""

import os
import select
import threading
from typing import IO

from llm_trainer.common.redaction import hide_secrets

CHUNK_BYTES = 16384
KEPT_BYTES = 16384
HELD_SECONDS = 1.0  # a line that has not ended by then is shown as far as it goes, as one that asks for an answer
MAX_HELD_BYTES = 1 << 20


class OutputCopier(threading.Thread):
    """A thread that copies a pipe to a stream without secrets, and keeps its last bytes in `kept`."""

    def __init__(self, source: IO[bytes], target: IO[bytes]) -> None:
        """Copy from `source` to `target`. What waits for an end of its line is at most a second old."""
        super().__init__(daemon=True)
        self.source, self.target = source, target
        self.kept = b""

    def run(self) -> None:
        """Copy to the end of the pipe."""
        held = b""
        while True:
            is_late = held and not select.select([self.source], [], [], HELD_SECONDS)[0]
            chunk = b"" if is_late else os.read(self.source.fileno(), CHUNK_BYTES)
            held += chunk
            end = max(held.rfind(b"\n"), held.rfind(b"\r")) + 1
            if not chunk or len(held) - end > MAX_HELD_BYTES:
                end = len(held)
            self.copy(held[:end])
            held = held[end:]
            if not chunk and not is_late:
                return

    def copy(self, content: bytes) -> None:
        """Write some whole lines."""
        text = hide_secrets(content.decode(errors="surrogateescape"))
        shown = text.encode(errors="surrogateescape")
        self.target.write(shown)
        self.target.flush()
        self.kept = (self.kept + shown)[-KEPT_BYTES:]
