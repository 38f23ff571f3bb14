# SPDX-License-Identifier: Apache-2.0
"""bench/gpu_tables.py: the tables of the results are those that the kept figures give."""

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[3] / "bench"
sys.path.append(str(BENCH))
import gpu_tables  # noqa: E402

GIB = 2**30


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of the figures, an empty one."""
    monkeypatch.setattr(gpu_tables, "HERE", tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    return tmp_path / "kept"


def leave(folder, **files):
    """Write files as the kit does, in a folder of a call."""
    for name, found in files.items():
        (folder / name).mkdir(parents=True)
        (folder / name / f"{name}.json").write_text(json.dumps(found))
    return folder


def fast(seconds):
    measurement = {"tokens_per_second": 8192 / seconds, "flops_per_second": 400e12, "peak_bytes": 50 * GIB}
    measurement |= {"step_seconds": seconds, "phase_seconds": {"forward": 0.2, "backward": 0.3, "optimizer": 0.01}}
    variants = {"nf4": {"measurement": measurement}, "fp8": {"error": "out of memory"}}
    return {"size": "8B", "device": "NVIDIA H100, torch 2.11.0", "ceiling": 800e12, "variants": variants}


def test_the_tables_of_the_results_are_those_of_the_figures():
    text = (BENCH / "RESULTS.md").read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- end of table -->") == len(gpu_tables.TABLE.findall(text))
    assert gpu_tables.write_tables(text) == text


def test_a_variant_has_the_figures_of_its_newest_call(kept, tmp_path):
    gpu_tables.take_in([leave(tmp_path / "1", fast=fast(0.5)), leave(tmp_path / "2", fast=fast(0.512))])
    table = gpu_tables.write_tables("<!-- table: gpu-h100.json variants -->\nold\n<!-- end of table -->")
    assert table.splitlines()[3:-1] == [
        f"| {gpu_tables.VARIANTS['nf4']} | 16,000 | 400.0 | 50.0 % | 50.0 | 512 = 200 + 300 + 10 | 2 |"
    ]


def test_what_failed_has_no_row(kept, tmp_path):
    memory = {"estimate": {"peak_bytes": 11 * GIB}, "measured_peak_bytes": 10 * GIB}
    jobs = {"lora": {"exit": 0, "memory": memory}, "full": {"exit": 1, "memory": memory}, "packed": {"exit": 0}}
    versions = {"torch": "2.11"}
    peer = {"step_seconds": 0.5, "tokens": [8192] * 3, "peak_bytes": 60 * GIB, "versions": versions, "wrong": ""}
    peers = {"trl": peer, "unsloth": {"wrong": "its 100 s were up"}, "llm-trainer": {**peer, "wrong": "no steps"}}
    files = {
        "correct": {"size": "1B", "device": "NVIDIA H100", "jobs": jobs},
        "peers": {"tokens_per_step": 8192, "device": "NVIDIA H100", "peers": peers},
    }
    gpu_tables.take_in([leave(tmp_path / "1", **files)])
    figures = gpu_tables.read_figures(kept / "gpu-h100.json")
    assert gpu_tables.render(figures, "jobs").splitlines()[2:] == ["| LoRA | 11.00 | 10.00 | +10.0 % | 1 |"]
    rows = gpu_tables.render(figures, "peers").splitlines()[2:]
    assert rows == [f"| {gpu_tables.PEERS['trl']} | 16,384 | 500 | 8,192 | 60.0 | torch 2.11 | 1 |"]
    assert gpu_tables.render(figures, "variants") == "Not measured yet.\n"
