# SPDX-License-Identifier: Apache-2.0
"""The first stop signal becomes a file and a line of the log; later ones change nothing."""

import os
import signal
import subprocess
import sys

import pytest

from llm_trainer.launcher.stop_signal import StopSignal
from support.waiting import GUARD_SECONDS


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_becomes_a_file_and_one_line(tmp_path, capfd, signum):
    file = tmp_path / "stop"
    with StopSignal(file) as stop:
        assert stop.received_at is None
        for _ in range(2):
            os.kill(os.getpid(), signum)
        assert file.exists()
        first = stop.received_at
        assert first
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received_at == first
        stop.log_end()
    line, end = capfd.readouterr().out.splitlines()
    assert line == f"Received {signum.name}: after this step, save a checkpoint, export and end."
    assert end.startswith("All processes ended 0.")


def test_without_a_signal_nothing_is_said_and_the_handlers_come_back(tmp_path, capfd):
    earlier = signal.getsignal(signal.SIGTERM)
    with StopSignal(tmp_path / "stop") as stop:
        assert signal.getsignal(signal.SIGTERM) == stop.receive
        stop.log_end()
    assert signal.getsignal(signal.SIGTERM) == earlier
    assert not (tmp_path / "stop").exists()
    assert capfd.readouterr().out == ""


# Sends a signal to itself at the moment in which the modules of a command are imported.
SIGNALLED_WHILE_IMPORTING = """
import os, sys
from llm_trainer.cli.main import main

module, signum = sys.argv.pop(1), int(sys.argv.pop(1))

class Signaller:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), signum)

sys.meta_path.insert(0, Signaller())
sys.exit(main())
"""


def run_signalled(module, signum, words, **variables):
    command = [sys.executable, "-c", SIGNALLED_WHILE_IMPORTING, module, str(int(signum)), *words]
    return subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=GUARD_SECONDS, check=False
    )


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_comes_while_the_launcher_is_imported_is_a_stop_before_the_training(tree, signum):
    result = run_signalled("llm_trainer.launcher.launch", signum, ["train"], SAGEMAKER_BASE_DIR=str(tree.base_dir))
    assert result.returncode == 0, result.stderr
    assert f"Received {signum.name}: " in result.stdout
    assert "Stopped before the training began: there is nothing to save." in result.stdout
    assert not tree.model_files
    assert not (tree.base_dir / "output/failure").exists()


def test_a_script_is_not_started_after_a_signal(tree):
    tree.change(sagemaker_program="train.py")
    tree.write("input/data/code/train.py", "print('the script runs')")
    module = "llm_trainer.launcher.launch"
    result = run_signalled(module, signal.SIGTERM, ["train"], SAGEMAKER_BASE_DIR=str(tree.base_dir))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "Received SIGTERM before the script began: it is not started.\n"


def test_a_signal_ends_another_command_which_pid_1_would_not_hear(tree):
    result = run_signalled("llm_trainer.cli.metrics", signal.SIGTERM, ["metrics"])
    assert (result.returncode, result.stdout) == (143, "")
