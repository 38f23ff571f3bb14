# SPDX-License-Identifier: Apache-2.0
"""What is made for a GPU runs here too: on the CPU with tiny models, and not at all, with the reason, without them."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.waiting import GUARD_SECONDS

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parents[2]
FILES = [f"tests/gpu/test_{name}.py" for name in ("attention_kernels", "packing_parity", "quantized_training")]


def run(*words: str, **variables: str) -> str:
    result = subprocess.run(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env={**os.environ, **variables, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=GUARD_SECONDS,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def test_the_gpu_tests_pass_on_tiny_models():
    pytest.importorskip("bitsandbytes")
    printed = run("-m", "pytest", "-s", "-rs", *FILES, LLM_TRAINER_GPU_TEST_SIZE="tiny")
    assert int(re.search(r"(\d+) passed", printed)[1]) >= 16
    assert "logits move by" in printed
    assert "flash_attn is not installed here" in printed or "flash_attention_2 is meant for a GPU" in printed


def test_the_gpu_tests_skip_with_the_reason_where_there_is_no_gpu():
    printed = run("-m", "pytest", "-rs", *FILES, LLM_TRAINER_GPU_TEST_SIZE="1B")
    assert "no CUDA GPU here" in printed
    assert "passed" not in printed


def test_the_benchmark_prints_a_row_for_each_variant_and_keeps_the_figures(tmp_path):
    pytest.importorskip("bitsandbytes")
    variants = ["no recomputation", "fused adapters", "nf4", "fp8", "fp8, fused"]
    printed = run("bench/gpu.py", "--size", "tiny", "--out", str(tmp_path), *variants)
    rows = [line.split(" | ") for line in printed.splitlines()]
    rows = [row for row in rows if row[0].removeprefix("| ") in variants]
    assert [row[0].removeprefix("| ") for row in rows] == variants
    assert all(float(row[1].replace(",", "")) > 0 and row[3].endswith("%") for row in rows)
    figures = json.loads((tmp_path / "fast.json").read_text())["variants"]
    plain, fused = (figures[name]["measurement"]["losses"] for name in variants[:2])
    assert fused == pytest.approx(plain, rel=1e-4)


def test_whole_jobs_of_the_kit_are_run_and_judged(tmp_path, monkeypatch):
    names = ("lora", "fsdp", "answers")
    printed = run(
        "tests/gpu/correct.py", "--size", "tiny", "--out", str(tmp_path), "--seconds", "450", "--only", *names
    )
    found = json.loads((tmp_path / "correct.json").read_text())
    jobs = found["jobs"]
    assert set(jobs) == set(names)
    assert all(met for job in jobs.values() for _, met, _ in job["verdicts"]), printed
    assert "losses alike" in [demand for demand, _, _ in jobs["fsdp"]["verdicts"]]
    assert (tmp_path / "logs.tar.gz").stat().st_size > 0

    for folder in ("tests/gpu", "bench"):
        monkeypatch.syspath_prepend(str(REPOSITORY / folder))
    judge, job = importlib.import_module("judge"), importlib.import_module("whole_jobs").JOBS[0]
    assert list_unmet(judge.judge_job(job, jobs["lora"], on_gpu=False)) == []
    worse = {
        **jobs["lora"],
        "exit": 1,
        "losses": dict.fromkeys(jobs["lora"]["losses"], 7.0),
        "warnings": ["Warning: x"],
    }
    assert list_unmet(judge.judge_job(job, worse, on_gpu=False)) == ["exit", "learns", "no warnings"]
    assert list_unmet(judge.judge_likeness(job, worse, jobs["lora"])) == ["losses alike"]
    measured = {"measured_peak_bytes": 100, "estimate": {"peak_bytes": 106}}
    assert "estimate" in list_unmet(judge.judge_job(job, {**jobs["lora"], "memory": measured}, on_gpu=True))


def list_unmet(verdicts):
    return [demand for demand, met, _ in verdicts if not met]
