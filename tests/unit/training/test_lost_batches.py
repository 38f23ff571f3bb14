# SPDX-License-Identifier: Apache-2.0
"""A batch that cannot be handed over ends the DataLoader, where the training would wait for it forever."""

import subprocess
import sys

import pytest

from support.waiting import GUARD_SECONDS

SCRIPT = """
import sys
from multiprocessing.reduction import ForkingPickler
from torch.utils.data import DataLoader
from llm_trainer.training.lost_batches import end_process_on_lost_batch

class Row:
    def __reduce__(self):
        raise {error}

end_process_on_lost_batch()
next(iter(DataLoader([1, 2], num_workers=1, collate_fn=lambda rows: Row())))
"""


@pytest.mark.parametrize(
    ("error", "sentence"),
    [("OSError('no room in /dev/shm')", "insufficient shared memory"), ("KeyError('odd')", "exited unexpectedly")],
)
def test_a_lost_batch_ends_the_training(error, sentence):
    command = [sys.executable, "-c", SCRIPT.format(error=error)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=GUARD_SECONDS, check=False)
    assert result.returncode == 1
    assert sentence in result.stderr
