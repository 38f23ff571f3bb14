# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer doctor` judges this machine, with a real all-reduce, and machines that a fake NVML makes of it."""

import os
import socket
import subprocess
import sys

import psutil
import pytest
import torch

from llm_trainer.cli import all_reduce, doctor
from llm_trainer.config.environment import read_environment
from support.launchers import set_by_train_job
from support.waiting import GUARD_SECONDS, wait_until


@pytest.fixture
def run_doctor(tmp_path):
    """Runs the doctor on an empty SageMaker tree, or one with hyperparameters."""

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "llm_trainer", "doctor", *arguments],
            env={**os.environ, "SAGEMAKER_BASE_DIR": str(tmp_path), **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=GUARD_SECONDS,
            check=False,
        )

    return run


@pytest.fixture
def broken_torch(tmp_path) -> dict[str, str]:
    """A torch of CUDA 13.0 that holds nothing else: what needs no GPU is judged, and the self-test fails at once."""
    folder = tmp_path / "site/torch"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    return {"PYTHONPATH": f"{folder.parent}:{os.environ.get('PYTHONPATH', '')}"}


def row(result: subprocess.CompletedProcess[str], subject: str) -> str:
    """The line about a subject, its columns one space apart."""
    (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"{subject} ")]
    return " ".join(line.split())


def test_an_old_driver_is_an_error_and_so_is_a_failed_self_test(run_doctor, fake_nvml, broken_torch):
    machine = fake_nvml(gpus=2, driver="535.183.01", cuda="12.2") | broken_torch
    result = run_doctor(**machine, **set_by_train_job(1))
    assert result.returncode == 1
    assert row(result, "launcher").startswith("launcher ok Launched by Kubeflow: node 2 of 2, the first at 127.0.0.1 (")
    assert row(result, "GPUs") == "GPUs ok 2 x NVIDIA Fake 24GB, 24 GiB"
    assert row(result, "driver").startswith("driver error 535.183.01 supports CUDA 12.2, torch is built with CUDA 13.0")
    assert "No module named" in row(result, "all-reduce")
    assert row(result, "all-reduce").startswith("all-reduce error over 2 GPUs by NCCL failed (")
    assert result.stdout.splitlines()[-1].endswith("a job would fail here.")


def test_a_self_test_without_end_is_cut_off_with_all_its_processes(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(
        f"""
import os, pathlib, time
if "RANK" in os.environ:
    pathlib.Path({str(tmp_path)!r}, f"{{os.getpid()}}.pid").touch()
    time.sleep(600)
"""
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))

    class TimeIsUp(subprocess.Popen):
        """Its time is up as soon as both workers hang."""

        def communicate(self, _input=None, timeout=None):
            if timeout is not None:
                wait_until(lambda: len([*tmp_path.glob("*.pid")]) == 2)
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().communicate()

    monkeypatch.setattr(subprocess, "Popen", TimeIsUp)
    finding = doctor.try_all_reduce(read_environment(), num_gpus=0)
    assert finding.verdict == "error"
    assert f"no end within {doctor.SELF_TEST_SECONDS} s" in finding.text
    workers = [int(file.stem) for file in tmp_path.glob("*.pid")]
    assert len(workers) == 2
    assert not [pid for pid in workers if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def test_this_machine_is_well_trackers_and_wrong_settings_only_warn_and_no_secret_is_shown(run_doctor, tmp_path):
    (tmp_path / "input/config").mkdir(parents=True)
    (tmp_path / "input/config/hyperparameters.json").write_text('{"lora_rnak": "8", "wandb_token": "hunter2"}')
    (tmp_path / "input/data/config").mkdir(parents=True)
    (tmp_path / "input/data/config/args.yaml").write_text("token: hunter2: x\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run_doctor(
            *("--mlflow_uri", f"http://someone:hunter2@127.0.0.1:{port}/path"),
            WANDB_API_KEY="hunter2",
            WANDB_BASE_URL="http://127.0.0.1:9",
            HF_TOKEN="hunter2",
        )
    assert result.returncode == 0, result.stdout
    assert row(result, "all-reduce").startswith("all-reduce ok over 2 CPU processes by Gloo: right sum")
    assert result.stdout.splitlines()[-1].endswith("a job would run here.")
    assert "\033" not in result.stdout
    assert row(result, "MLflow").startswith(f"MLflow ok 127.0.0.1:{port} answers")
    assert row(result, "W&B").startswith("W&B warning 127.0.0.1:9 cannot be reached")
    assert row(result, "settings").startswith("settings warning 1 of 2 problems: ")
    assert "hunter2" not in result.stdout


def test_the_self_test_names_a_gpu_that_torch_has_no_kernels_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    assert all_reduce.main("nccl") == 1
    told = doctor.find_last_useful_line(capsys.readouterr().err)
    assert told.startswith("Error: Tesla V100-SXM2-16GB (7.0) is a GPU that this image's torch has no kernels for (")


def test_an_address_that_never_answers_is_given_up(monkeypatch):
    monkeypatch.setattr(doctor, "CONNECT_SECONDS", 0.2)
    with socket.socket() as full:  # its queue is full, so that connections are neither made nor refused
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        with socket.create_connection(full.getsockname()):
            finding = doctor.try_address("MLflow", f"http://127.0.0.1:{full.getsockname()[1]}")
    assert finding.verdict == "warning"
    assert "cannot be reached" in finding.text


def test_an_unreadable_tree_is_an_error(run_doctor, tmp_path):
    (tmp_path / "input/config").mkdir(parents=True)
    (tmp_path / "input/config/hyperparameters.json").write_text("{'a': 1}")
    result = run_doctor()
    assert result.returncode == 1
    assert "hyperparameters.json is not valid JSON" in result.stdout
