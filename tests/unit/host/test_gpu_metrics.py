# SPDX-License-Identifier: Apache-2.0
"""What is read of GPUs, through the real pynvml and a fake libnvidia-ml, and what is said of their faults."""

import json
import os
import subprocess
import sys

import pytest

from llm_trainer.host.gpu_metrics import ACTIVITY, GPU_METRICS, XIDS, describe_xid, find_visible_gpus

READ = """
import json, sys, time
from llm_trainer.host.nvidia_driver import open_nvml
from llm_trainer.host.gpu_metrics import Gpus

warnings, samples = [], []
with open_nvml():
    gpus = Gpus("algo-1", warnings.append)
    for state in json.loads(sys.argv[1]):
        open(sys.argv[2], "w").write(state)
        gpus.collect_xids()
        samples.append(gpus.read())
print(json.dumps([samples, warnings, list(gpus.faults)]))
assert "torch" not in sys.modules
"""


@pytest.fixture
def read(fake_nvml, tmp_path):
    """Reads `gpus` GPUs once for each state; the samples, the warnings and the faults."""

    def run(*states, gpus=8, **variables):
        state = tmp_path / "state"
        result = subprocess.run(
            [sys.executable, "-c", READ, json.dumps(states), str(state)],
            env={**os.environ, **fake_nvml(gpus=gpus), "FAKE_NVML_STATE": str(state), **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


def test_eight_gpus_are_each_told_by_their_own_figures(read):
    (first, second), warnings, _ = read("utilization 0 97\nutilization 7 12\n", "")
    assert second.keys() == set(GPU_METRICS)
    assert second.keys() - first.keys() == {name for _, name, _ in ACTIVITY}  # between two samples
    assert [first["utilization_percent"][index] for index in (0, 7)] == [97, 12]
    assert first["temperature_celsius"] == [50 + index for index in range(8)]
    assert first["power_watts"] == [300.5 + index for index in range(8)]
    assert second["sm_activity_percent"] == [2.2 + 10 * index for index in range(8)]
    assert second["nvlink_received_bytes_per_second"][1] == 70.25 * 2**20
    assert second["memory_total_bytes"] == [24 << 30] * 8
    assert len({*second["utilization_percent"]}) == 8
    assert not warnings


def test_what_a_gpu_does_not_support_is_left_out_for_it_alone(read):
    (_, sample), warnings, _ = read("old 1 0\nplain 2 0\n", "", gpus=3)
    assert sample["power_watts"] == [300.5, 301.5, None]
    assert sample["ecc_corrected_errors"] == [3, 3, None]
    assert sample["tensor_activity_percent"] == [5.2, None, None]
    assert sample["temperature_celsius"] == [50, 51, 52]
    assert not warnings


def test_a_lost_gpu_is_told_of_once_and_the_others_go_on(read):
    samples, warnings, faults = read("", "lost 1 0\n", "lost 1 0\n", gpus=3)
    assert [sample["temperature_celsius"] for sample in samples] == [[50, 51, 52], [50, None, 52], [50, None, 52]]
    assert warnings == faults == ["GPU 1 of algo-1 no longer answers (GPU is lost): its metrics end."]


def test_when_all_gpus_are_lost_there_is_nothing_more_to_say(read):
    samples, warnings, _ = read("", "lost 0 0\n", "", gpus=1)
    assert samples[1:] == [{}, {}]
    assert len(warnings) == 1


def test_an_xid_is_counted_each_time_and_said_once(read):
    state = "xid 1 79\n"
    samples, warnings, faults = read("", state, state + state, state + state + "xid 0 7777\n", gpus=2)
    assert [sample["xid_errors"] for sample in samples] == [[0, 0], [0, 1], [0, 2], [1, 2]]
    assert warnings == [
        describe_xid(1, "algo-1", 79),
        "GPU 0 of algo-1 reported XID 7777: see NVIDIA's list of XID errors.",
    ]
    assert faults == warnings


def test_harmful_throttling_is_said_once_and_the_power_limit_never(read):
    samples, warnings, _ = read("throttle 0 4\n", "throttle 0 72\n", "", "throttle 0 64\n", gpus=1)
    assert [sample["throttled_power_cap"] for sample in samples] == [[1], [0], [0], [0]]
    assert [sample["throttled_thermal"] for sample in samples] == [[0], [1], [0], [1]]
    assert [sample["throttled_hardware"] for sample in samples] == [[0], [1], [0], [0]]
    assert len(warnings) == 2
    assert "GPU 0 of algo-1: heat slows its clocks: its cooling does not keep up." in warnings


def test_hidden_gpus_are_not_read_and_the_others_keep_their_numbers(read):
    (sample,), _, _ = read("", gpus=4, CUDA_VISIBLE_DEVICES="3,1")
    assert sample["temperature_celsius"] == [None, 51, None, 53]


@pytest.mark.parametrize(
    ("variables", "indices"),
    [
        ({}, [0, 1, 2]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": " 2, 0"}, [0, 2]),
        ({"CUDA_VISIBLE_DEVICES": "0,7"}, [0]),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}, [0, 1, 2]),
    ],
)
def test_visible_gpus(variables, indices):
    assert find_visible_gpus(3, variables) == indices


@pytest.mark.parametrize("xid", [13, 31, 43, 45, 48, 63, 64, 74, 79, 94, 95, 119])
def test_common_xids_are_explained(xid):
    assert describe_xid(0, "algo-2", xid) == f"GPU 0 of algo-2 reported XID {xid}: {XIDS[xid]}."
