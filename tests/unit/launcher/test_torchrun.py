# SPDX-License-Identifier: Apache-2.0
"""torchrun itself is called, on a host whose first one cannot be reached."""

import os
import socket
import subprocess
import sys

import pytest

from llm_trainer.common.errors import read_failures
from support.waiting import GUARD_SECONDS


@pytest.mark.long
def test_hosts_that_do_not_reach_each_other_are_told_of_the_port(tmp_path):
    (tmp_path / "failures").mkdir()
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # it does not listen
        place = [f"--master-port={unheard.getsockname()[1]}", "--master-addr=127.0.0.1", "--local-addr=127.0.0.1"]
        place += ["--nnodes=2", "--node-rank=1", "--nproc-per-node=1", "--rdzv-conf=timeout=1"]
        command = [sys.executable, "-m", "llm_trainer.launcher.torchrun", *place, "--", "true"]
        environment = {**os.environ, "LLM_TRAINER_SCRATCH": str(tmp_path)}
        result = subprocess.run(command, env=environment, timeout=GUARD_SECONDS, check=False)
    assert result.returncode == 1
    (failure,) = read_failures(tmp_path / "failures")
    assert failure.kind == "peer"  # where the first host was lost, that is the cause
    assert failure.reason.startswith("The hosts do not reach each other on port 7777 of the first one, or lost it: ")
