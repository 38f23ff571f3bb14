# SPDX-License-Identifier: Apache-2.0
"""The workers' command names their hosts and numbers, and their environment what libraries read."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

from llm_trainer.config.environment import read_environment
from llm_trainer.job.inputs import Inputs
from llm_trainer.launcher import worker_processes
from llm_trainer.launcher.worker_processes import WorkerProcesses, build_cache_variables, build_library_variables

HOST_TIMEOUT = 900


@pytest.fixture
def make_workers(tmp_path, monkeypatch):
    """Makes the workers of this host, in a job of these hosts on machines of eight CPUs."""
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))

    def make(num_processes: int, hosts=("algo-1",), current_host="algo-1", on_gpu=False) -> WorkerProcesses:
        changes = {"hosts": list(hosts), "current_host": current_host, "num_cpus": 8}
        return WorkerProcesses(dataclasses.replace(read_environment(), **changes), num_processes, on_gpu, HOST_TIMEOUT)

    return make


def test_one_process_on_one_host_needs_no_torchrun(make_workers):
    command = make_workers(1).build_command()
    assert command == [sys.executable, "-P", "-m", "llm_trainer.launcher.single_worker"]


def test_processes_of_one_host_talk_over_its_loopback(make_workers):
    command = make_workers(2).build_command()
    assert command[3:] == [
        *("llm_trainer.launcher.torchrun", "--nproc-per-node=2", "--local-addr=127.0.0.1"),
        *("--", sys.executable, "-P", "-m", "llm_trainer.worker"),
    ]


def test_several_hosts_meet_at_the_first(make_workers):
    command = make_workers(1, ["algo-1", "algo-2"], "algo-2").build_command()
    options = {"--nnodes=2", "--node-rank=1", "--master-addr=algo-1", "--master-port=7777", "--local-addr=algo-2"}
    options |= {f"--rdzv-conf=timeout={HOST_TIMEOUT + worker_processes.IMPORT_SECONDS}"}
    assert options <= set(command)


def test_threads_share_the_cores_and_the_libraries_variables_win(make_workers, tmp_path):
    libraries = {"HF_HOME": "/cache", "PYTHONUNBUFFERED": "0"}
    variables = make_workers(3, ["a", "b"], "a").build_variables(tmp_path, 12.5, libraries)
    assert variables["OMP_NUM_THREADS"] == "2"
    assert variables["LLM_TRAINER_SCRATCH"] == str(tmp_path)
    assert variables["LLM_TRAINER_STARTED"] == "12.5"
    assert variables["LLM_TRAINER_HOST"] == "a"
    assert libraries.items() <= variables.items()
    assert worker_processes.KEPT_MEMORY.items() <= variables.items()


def test_nothing_is_imported_from_the_working_folder(make_workers, tmp_path):
    libraries = {"PYTHONPATH": "/mine::here", "PYTHONSAFEPATH": ""}
    variables = make_workers(1).build_variables(tmp_path, 0.0, libraries)
    assert (variables["PYTHONPATH"], variables["PYTHONSAFEPATH"]) == ("/mine", "1")


def test_memory_is_given_back_on_gpus_and_one_host_has_no_name(make_workers, tmp_path):
    variables = make_workers(16, on_gpu=True).build_variables(tmp_path, 0.0, {})
    assert variables["OMP_NUM_THREADS"] == "1"
    assert not {"LLM_TRAINER_HOST", *worker_processes.KEPT_MEMORY} & variables.keys()


@pytest.mark.parametrize(
    ("given", "setting"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:cudaMallocAsync"}, "backend:cudaMallocAsync"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:128"}, None),  # torch reads both
    ],
)
def test_segments_of_gpu_memory_grow_unless_the_user_sets_the_allocator(make_workers, tmp_path, given, setting):
    variables = make_workers(8, on_gpu=True).build_variables(tmp_path, 0.0, given)
    assert variables.get("PYTORCH_ALLOC_CONF") == setting
    assert given.items() <= variables.items()
    assert "PYTORCH_ALLOC_CONF" not in make_workers(2).build_variables(tmp_path, 0.0, {})


def make_inputs(model: str) -> Inputs:
    names = {field.name for field in dataclasses.fields(Inputs)}
    values = {"model": model, "train": (), "validation": (), "adapter": None, "teacher": ""}
    return Inputs(**values, **dict.fromkeys(names - values.keys(), Path("/nowhere")))


@pytest.mark.parametrize(
    ("model", "template", "pushes", "is_offline"),
    [
        ("{folder}", None, False, True),
        ("{folder}", None, True, False),
        ("{folder}", "org/other", False, False),
        ("org/model", None, False, False),
    ],
)
def test_the_hub_is_off_where_nothing_is_asked_of_it(tmp_path, monkeypatch, model, template, pushes, is_offline):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    variables = build_library_variables(make_inputs(model.format(folder=tmp_path)), template, pushes)
    assert ("HF_HUB_OFFLINE" in variables) is is_offline


def test_what_the_user_sets_wins_over_our_defaults(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", "/mine")
    monkeypatch.delenv("HF_HUB_DISABLE_TELEMETRY", raising=False)
    variables = build_library_variables(make_inputs(str(tmp_path)), None, False)
    assert (variables["HF_HOME"], variables["HF_HUB_DISABLE_TELEMETRY"]) == ("/mine", "1")


def test_caches_lie_in_the_warm_pools_folder_if_there_is_one_where_nobody_else_may_write(tmp_path):
    caches = build_cache_variables({"SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY": str(tmp_path)})
    root = tmp_path / f"llm-trainer-{os.getuid()}"
    assert {Path(folder).parent for folder in caches.values()} == {root}
    assert root.stat().st_mode & 0o777 == 0o700
    assert not any(folder.startswith(str(tmp_path)) for folder in build_cache_variables({}).values())


def test_a_cache_that_others_could_write_to_is_not_used(tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / f"llm-trainer-{os.getuid()}").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        caches = build_cache_variables({"SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY": str(tmp_path)})
    (root,) = {Path(folder).parent for folder in caches.values()}
    assert root.name.startswith(f"llm-trainer-{os.getuid()}-")
    assert capsys.readouterr().out.count("could be written by others") == 1
