# SPDX-License-Identifier: Apache-2.0
"""bench/gpu_peers.py: what a peer does wrong is told, and takes no other along."""

import json
import sys
from pathlib import Path

import psutil
import pytest

from support.waiting import GUARD_SECONDS, wait_until

BENCH = Path(__file__).parents[3] / "bench"
sys.path.append(str(BENCH))
import gpu_peers  # noqa: E402

WELL = {
    "step_seconds": 0.5,
    "tokens": [128, 128],
    "losses": [6.0, 5.0],
    "peak_bytes": 2**30,
    "versions": {"torch": "2"},
}
# Stands in the place of the peers' program, and does what the peer's name tells.
STAND_IN = """
import json, pathlib, subprocess, sys, time
peer, folder, packed_tokens = sys.argv[1:]
if peer == "unsloth":
    print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
    time.sleep(600)
sys.stdin.readline()
if peer == "trl":
    sys.exit("out of memory")
pathlib.Path(folder, peer + ".json").write_text({well!r})
time.sleep(600)  # as an export would
"""


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, ""),
        ({"tokens": [128, 64]}, "steps of [64, 128] tokens in the place of 128"),
        ({"losses": [6.0, float("nan")]}, "it does not learn: [6.0, nan]"),
        ({"losses": [5.0, 6.0]}, "it does not learn: [5.0, 6.0]"),
        ({"losses": []}, "it does not learn: []"),
        ({"error": "its 100 s were up"}, "its 100 s were up"),
    ],
)
def test_a_measurement_counts_if_it_trained_every_token_and_learned(change, wrong):
    assert gpu_peers.judge({**WELL, **change}, 128) == wrong


def test_a_peer_that_fails_or_hangs_stops_no_other(tmp_path, monkeypatch, capsys):
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN.format(well=json.dumps(WELL)))
    monkeypatch.setattr(gpu_peers, "PROGRAM", program)
    monkeypatch.setattr(gpu_peers, "PREPARATION", [sys.executable, "-c", ""])
    measure = gpu_peers.Peer.measure

    def measure_soon(peer, seconds):
        if peer.name != "unsloth":
            return measure(peer, GUARD_SECONDS)
        wait_until(lambda: peer.log.read_text().endswith("\n"))
        return measure(peer, 0.1)

    monkeypatch.setattr(gpu_peers.Peer, "measure", measure_soon)
    assert not gpu_peers.measure_all(["llm-trainer", "trl", "unsloth", "trl-tuned"], "tiny", tmp_path, tmp_path)
    peers = json.loads((tmp_path / "peers.json").read_text())["peers"]
    assert [peer["wrong"] for peer in peers.values()] == ["", "it ended with code 1", "its 0 s were up", ""]
    assert "out of memory" in peers["trl"]["log"]
    started = int(peers["unsloth"]["log"])
    assert not psutil.pid_exists(started) or psutil.Process(started).status() == psutil.STATUS_ZOMBIE
    assert "| llm-trainer | 256 | 500 | 128 | 1.0 | 6.00 to 5.00 |" in capsys.readouterr().out
