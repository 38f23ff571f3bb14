# SPDX-License-Identifier: Apache-2.0
"""Samples reach the journal from threads that neither a hung driver nor the end of the job is held up by."""

import os
import subprocess
import sys
import time
from typing import ClassVar

import pytest

from llm_trainer.host.gpu_metrics import GPU_METRICS
from llm_trainer.host.host_metrics import HOST_METRICS
from llm_trainer.host.system_metrics import SystemMetrics, choose_interval
from llm_trainer.journal.journal import Journal, read_records
from support.waiting import GUARD_SECONDS

SAMPLE = """
import sys, time
from pathlib import Path
from llm_trainer.host import system_metrics
from llm_trainer.journal.journal import Journal, read_records

system_metrics.MIN_INTERVAL_SECONDS = system_metrics.WATCH_SECONDS = 0.05
system_metrics.HANG_SECONDS = float(sys.argv[3])
file, kinds = Path(sys.argv[1]), eval(sys.argv[2])
with system_metrics.SystemMetrics("algo-2", {}, Journal(file).write, time.time()) as metrics:
    while not all(any(kind in str(record) for record, _ in read_records(file)) for kind in kinds):
        time.sleep(0.05)
print(metrics.find_recent_faults())
assert "torch" not in sys.modules
"""


@pytest.fixture
def sample(tmp_path):
    """Samples until the journal has each of the words; its records and the output."""

    def run(*words, state="", hang_seconds=600.0, **variables):
        file = tmp_path / "metrics.jsonl"
        (tmp_path / "state").write_text(state)
        result = subprocess.run(
            [sys.executable, "-c", SAMPLE, str(file), repr(words), str(hang_seconds)],
            env={**os.environ, **variables, "FAKE_NVML_STATE": str(tmp_path / "state")},
            capture_output=True,
            text=True,
            check=False,
            timeout=GUARD_SECONDS,
        )
        assert result.returncode == 0, result.stderr
        return [record for record, _ in read_records(file)], result.stdout

    return run


def test_gpus_and_host_come_under_their_names(sample, fake_nvml):
    records, _ = sample("host/algo-2/cpu_percent", "gpu/algo-2/7/sm_activity", **fake_nvml(gpus=8))
    names = {name for record in records for name in record["values"]}
    assert {record["kind"] for record in records} == {"system"}
    assert {record["host"] for record in records} == {"algo-2"}
    assert {f"gpu/algo-2/{index}/{metric}" for index in range(8) for metric in GPU_METRICS} <= names
    assert {name.split("/")[2] for name in names if name.startswith("host/")} <= set(HOST_METRICS)


@pytest.mark.parametrize("visible", [{"FAKE_NVML_GPUS": "0"}, {"LD_LIBRARY_PATH": ""}])
def test_without_gpus_or_nvml_the_host_tells_its_own(sample, fake_nvml, visible):
    records, output = sample("host/algo-2/cpu_percent", **{**fake_nvml(), **visible})
    assert not [name for record in records for name in record["values"] if name.startswith("gpu/")]
    assert "Warning" not in output


def test_an_xid_is_an_event_a_line_of_the_log_and_a_fault_to_remember(sample, fake_nvml):
    records, output = sample("XID 48", state="xid 2 48\n", **fake_nvml(gpus=4))
    (event,) = [record for record in records if record["kind"] == "event"]
    text = "GPU 2 of algo-2 reported XID 48: uncorrectable memory error: the GPU has to be reset."
    assert {"host": "algo-2", "level": "warning", "text": text}.items() <= event.items()
    assert output.splitlines() == [f"Warning: {text}", str([text])]


def test_a_driver_that_hangs_is_told_of_and_holds_nothing_up(sample, fake_nvml):
    records, _ = sample("has not answered", state="hang 0 3600\n", hang_seconds=0.2, **fake_nvml(gpus=1))
    assert any(record["kind"] == "system" for record in records)


def test_old_faults_explain_nothing(tmp_path, monkeypatch):
    class Gpus:
        faults: ClassVar = {"old": time.monotonic() - 301, "new": time.monotonic()}

    metrics = SystemMetrics("algo-1", {}, Journal(tmp_path / "metrics.jsonl").write, 0.0)
    monkeypatch.setattr(metrics, "gpus", Gpus)
    assert metrics.find_recent_faults() == ["new"]


def test_the_interval_grows_with_the_job():
    ages = [0, 1800, 3600, 21600, 86400, 10**7]
    assert [choose_interval(age) for age in ages] == [5, 5, 10, 60, 60, 60]


def test_a_day_of_eight_hosts_with_eight_gpus_each_leaves_less_than_50_mb(tmp_path):
    age, rounds = 0.0, 0
    while age < 86400:
        age, rounds = age + choose_interval(age), rounds + 1
    file = tmp_path / "metrics.jsonl"
    write = Journal(file).write
    columns = {name: [987_654_321 if "bytes" in name else 99.9] * 8 for name in GPU_METRICS}
    columns |= {name: [1] * 8 for name in GPU_METRICS if name.startswith(("throttled", "ecc", "xid"))}
    columns |= {name: [1980] * 8 for name in GPU_METRICS if name.endswith("mhz")}
    write("system", host="algo-1", gpus=columns)
    write("system", host="algo-1", values={f"host/algo-1/{name}": 12_345_678_901 for name in HOST_METRICS})
    assert 8 * rounds * file.stat().st_size < 50e6


def test_the_launcher_needs_no_torch_for_it():
    code = "import sys, llm_trainer.launcher.launch; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
