# SPDX-License-Identifier: Apache-2.0
"""The first stop signal becomes a file and a line of the log; later ones change nothing."""

import os
import signal

import pytest

from llm_trainer.launcher.stop_signal import StopSignal


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
