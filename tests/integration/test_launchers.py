# SPDX-License-Identifier: Apache-2.0
"""Jobs that something else than SageMaker launches. Processes with exactly its variables stand for its nodes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from safetensors.torch import load_file

from support.launchers import (
    LAUNCHERS,
    set_by_batch,
    set_by_pytorch_job,
    set_by_srun,
    set_by_torchrun,
    set_by_train_job,
)
from support.measures import ROOT
from support.sagemaker_tree import HYPERPARAMETERS, LLM_TRAINER

EXAMPLES = ROOT / "examples"
WITHOUT_TREE = ("env", "-u", "SAGEMAKER_BASE_DIR")  # as where there is no /opt/ml
KUBERNETES = ["kubernetes/pytorchjob.yaml", "kubernetes/trainjob.yaml"]
FAKE_SRUN = """
import os, subprocess, sys
sys.path.insert(0, os.environ["SUPPORT"])
from support.launchers import set_by_srun
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
nodes = [subprocess.Popen(command, env={**os.environ, **set_by_srun(node)}) for node in range(2)]
sys.exit(max(node.wait() for node in nodes))
"""


@pytest.fixture
def make_nodes(make_tree, ports_of_hosts):
    """Makes trees without SageMaker's description of hosts, one for each of these sets of variables."""

    def make(*sets, **hyperparameters):
        trees = [make_tree() for _ in sets]
        for variables, tree in zip(sets, trees, strict=True):
            (tree.base_dir / "input/config/resourceconfig.json").unlink()
            tree.environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **variables}
            tree.change(**{"per_device_train_batch_size": "4", "host_timeout_seconds": "60"} | hyperparameters)
        return trees

    return make


@pytest.mark.long
@pytest.mark.parametrize("name", LAUNCHERS)
def test_two_nodes_of_any_launcher_train_one_model(make_nodes, start, name):
    nodes = make_nodes(*map(LAUNCHERS[name], range(2)))
    jobs = [start(node) for node in nodes]
    for number, job in enumerate(jobs):
        assert job.end() == 0, job.log + "OTHER NODE\n" + jobs[1 - number].log
        assert f"node {number + 1} of 2, the first at " in job.log
    first, second = nodes
    assert first.read_journal()[0]["hosts"] == ["node-0", "node-1"]
    assert first.read_journal()[0]["world_size"] == 2
    assert (first.base_dir / "output/data/report.html").exists()
    assert "adapter_model.safetensors" in first.model_files
    assert not second.model_files


@pytest.mark.long
@pytest.mark.parametrize(
    "example", ["kubernetes/pytorchjob.yaml", "kubernetes/trainjob.yaml", "batch/job-definition.json"]
)
def test_an_example_trains_on_two_nodes_that_share_their_folders(make_nodes, start, tmp_path, example):
    """Nothing but /fsx and the number of GPUs differs from what a cluster would run."""
    set_variables = {"pytorchjob": set_by_pytorch_job, "trainjob": set_by_train_job, "job-definition": set_by_batch}
    words = [word.replace("/fsx", str(tmp_path)) for word in read_words(EXAMPLES / example)]
    nodes = make_nodes(*map(set_variables[Path(example).stem], range(2)))
    shutil.copytree(nodes[0].base_dir / "input/data", tmp_path / "data")
    settings = [word for key, value in HYPERPARAMETERS.items() for word in (f"--{key}", value)]
    jobs = [start(node, command=[*WITHOUT_TREE, str(LLM_TRAINER), *words, *settings]) for node in nodes]
    assert [job.end() for job in jobs] == [0, 0], jobs[0].log + "OTHER NODE\n" + jobs[1].log
    assert (tmp_path / "runs/1/model/adapter_model.safetensors").exists()
    assert (tmp_path / "runs/1/output/data/report.html").exists()
    assert not (tmp_path / "runs/1/output/failure").exists()


@pytest.mark.long
def test_the_sbatch_script_trains_on_two_nodes_that_share_their_folders(make_nodes, start, tmp_path):
    """A program in srun's place starts the command on two nodes with srun's variables, without a container."""
    (tree,) = make_nodes({})
    shutil.copytree(tree.base_dir / "input/data", tmp_path / "data")
    srun = tmp_path / "bin/srun"
    srun.parent.mkdir()
    srun.write_text(f"#!{sys.executable}\n{FAKE_SRUN}")
    srun.chmod(0o755)
    path = f"{srun.parent}:{LLM_TRAINER.parent}:{os.environ['PATH']}"
    support = Path(__file__).parents[1]
    tree.environment |= {"PATH": path, "SUPPORT": str(support), "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}
    tree.environment |= {"DATA": str(tmp_path / "data"), "OUTPUT": str(tmp_path / "runs/7")}
    job = start(tree, command=[*WITHOUT_TREE, "bash", str(EXAMPLES / "slurm/train.sbatch")])
    assert job.end() == 0, job.log
    assert "Launched by Slurm's srun: node 1 of 2, the first at 127.0.0.1" in job.log
    assert (tmp_path / "runs/7/model/adapter_model.safetensors").exists()


def read_words(file):
    """The arguments of the image in an example."""
    if file.suffix == ".json":
        nodes = json.loads(file.read_text())["nodeProperties"]["nodeRangeProperties"]
        return nodes[0]["container"]["command"]
    job = list(yaml.safe_load_all(file.read_text()))[-1]["spec"]
    if "trainer" in job:
        return job["trainer"]["args"]
    return job["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["args"]


@pytest.mark.parametrize("stops", [pytest.param(False, marks=pytest.mark.long), True])
def test_torchrun_itself_starts_a_process_a_device(make_nodes, start, stops):
    """The one that leads trains with as many workers.

    A stop saves and ends well where it reaches every process, as Slurm's does, those that load data among them.
    """
    changes = {"num_train_epochs": "10000", "dataloader_num_workers": "1"} if stops else {}
    (tree,) = make_nodes({}, **changes)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29431"]
    script = [str(EXAMPLES / "source_code/train.py")]  # as SDK 3 starts it with `distributed`
    command = [*torchrun, *(["--no-python", str(LLM_TRAINER), "train"] if stops else script)]
    job = start(tree, command=command)
    if stops:
        job.wait_for("step=2;")
        started = psutil.Process(job.process.pid)
        for process in [started, *started.children(recursive=True)]:
            process.send_signal(signal.SIGTERM)
    exit_code = job.end()
    assert job.log.count("Launched by torchrun: node 1 of 1, with 2 processes on this node") == 1, job.log
    assert stops or exit_code == 0
    assert tree.read_journal()[0]["world_size"] == 2
    assert tree.manifest["stopped"] is stops
    assert load_file(tree.base_dir / "model/adapter_model.safetensors")


@pytest.mark.long
@pytest.mark.parametrize("num_local", [1, 2])
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_torchrun_itself_starts_two_nodes(make_nodes, start, rendezvous, num_local):
    """By c10d the nodes come in any order, and learn the first one's address from each other."""
    nodes = make_nodes({}, {}, per_device_train_batch_size=str(8 // num_local // 2))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--nproc-per-node={num_local}"]
    torchrun += ["--local-addr=127.0.0.1", "--no-python", f"--rdzv-backend={rendezvous}"]
    if rendezvous == "static":
        places = [["--master-addr=127.0.0.1", "--master-port=29431", f"--node-rank={number}"] for number in range(2)]
    else:
        places = [["--rdzv-endpoint=127.0.0.1:29431", "--rdzv-id=7"]] * 2
    jobs = [
        start(node, command=[*torchrun, *place, str(LLM_TRAINER), "train"])
        for node, place in zip(nodes, places, strict=True)
    ]
    assert [job.end() for job in jobs] == [0, 0], jobs[0].log + "OTHER NODE\n" + jobs[1].log
    first = next(node for node in nodes if node.model_files)
    assert first.read_journal()[0]["world_size"] == 2 * num_local
    assert len([node for node in nodes if node.model_files]) == 1


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK=0, WORLD_SIZE=2 in the environment without MASTER_ADDR: set all"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 in the environment without RANK, WORLD_SIZE, LOCAL_WORLD_SIZE"),
        (set_by_torchrun(2), "RANK=2, WORLD_SIZE=2 in the environment: RANK counts from 0 and must be below"),
        (
            set_by_torchrun(0),
            "Host node-1 could not be reached from node-0 within 2 s: see its log; and let the hosts reach each other "
            "on every port (the job's security groups). It has RANK=0, WORLD_SIZE=2, ",
        ),
        (
            set_by_srun(0, local_rank=1, num_local=2),
            "No process with local rank 0 came within 2 s on this node, where one has local rank 1: start all 2 ",
        ),
    ],
)
def test_a_world_that_does_not_come_together_ends_in_a_sentence(make_nodes, variables, sentence):
    (tree,) = make_nodes(variables, host_timeout_seconds="2")
    result = tree.run()
    assert result.returncode == 1
    assert tree.failure.startswith(sentence), tree.failure
    assert tree.failure in result.stdout


def test_a_port_in_use_ends_in_a_sentence(make_nodes):
    (tree,) = make_nodes(set_by_torchrun(0))
    with socket.create_server(("", 7778)):
        assert tree.run().returncode == 1
    assert tree.failure.startswith("Port 7778 of this host, on which the job's hosts talk, cannot be opened (")


def test_a_node_that_comes_too_late_is_told_and_so_is_the_one_that_waited(make_nodes):
    nodes = make_nodes(set_by_torchrun(0), set_by_torchrun(1), host_timeout_seconds="2")
    for own, node in enumerate(nodes):
        assert node.run().returncode == 1
        assert node.failure.startswith(f"Host node-{1 - own} could not be reached from node-{own} within 2 s")


def test_an_address_that_drops_packets_ends_in_a_sentence(make_nodes):
    """As a security group does. The kernel drops what comes to a listener whose queue is full."""
    (tree,) = make_nodes(set_by_torchrun(1) | {"MASTER_ADDR": "127.0.0.9"}, host_timeout_seconds="2")
    with socket.create_server(("127.0.0.9", 7778), backlog=0), socket.create_connection(("127.0.0.9", 7778)):
        assert tree.run().returncode == 1
    assert "Host node-0 could not be reached from node-1 within 2 s: see its log; and let the hosts" in tree.failure


@pytest.mark.long
def test_a_rank_that_two_machines_have_is_told(make_nodes, start):
    nodes = make_nodes(*map(set_by_torchrun, (1, 1, 0), (0, 0, 0), (3, 3, 3)), host_timeout_seconds="20")
    jobs = [start(node) for node in nodes]
    assert [job.end() for job in jobs] == [1, 1, 1]
    told = [node.failure for node in nodes]
    assert sum(
        "Two machines have called node-0 as node-1: give each machine of the job a rank" in text for text in told
    )
    assert "(and node-1 is there twice, also as 127.0.0.1)" in nodes[2].failure


@pytest.mark.parametrize(
    ("second", "settings", "sentences"),
    [
        (
            set_by_torchrun(1, num_nodes=3),
            {},
            (
                "Host node-1 could not be reached from node-0 within 2 s (127.0.0.1 calls as a host of another job: ",
                "(it takes this host for one of another job: give all hosts the same number of hosts, job name and sec",
            ),
        ),
        (
            set_by_torchrun(1) | {"MASTER_ADDR": "nobody.invalid"},
            {},
            (
                "It has RANK=0, WORLD_SIZE=2, ",
                "It has RANK=1, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1, MASTER_AD",
            ),
        ),
        (
            set_by_torchrun(1),
            {"learning_rate": "0.5"},
            ("Host node-1 differs from node-0 in learning_rate (0.01 on node-0): give all hosts of the job the same",)
            * 2,
        ),
    ],
)
def test_nodes_that_were_told_different_things_end_in_a_sentence_each(make_nodes, start, second, settings, sentences):
    nodes = make_nodes(set_by_torchrun(0), second, host_timeout_seconds="2" if not settings else "60")
    nodes[1].change(**settings)
    jobs = [start(node) for node in nodes]
    for node, job, sentence in zip(nodes, jobs, sentences, strict=True):
        assert job.end() == 1
        assert sentence in node.failure


def test_a_stray_rank_does_no_harm_and_folders_stand_for_opt_ml(make_nodes, tmp_path):
    """The stray variables are those of a shell. PMI_SIZE would have accelerate wait for others."""
    if Path("/opt/ml/input/data").exists():
        pytest.skip("this machine has an /opt/ml")
    (tree,) = make_nodes({})
    environment = {name: value for name, value in os.environ.items() if name != "SAGEMAKER_BASE_DIR"}
    environment |= {"RANK": "0", "PMI_SIZE": "4", "PMI_RANK": "3", "TORCHELASTIC_RUN_ID": "other"}
    folders = ["--data-dir", str(tree.base_dir / "input/data"), "--output-dir", str(tmp_path / "run")]
    settings = [word for key, value in HYPERPARAMETERS.items() for word in (f"--{key}", value)]
    command = [str(LLM_TRAINER), "train", *folders, *settings]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    warning = "Warning: RANK=0 in the environment without WORLD_SIZE, MASTER_ADDR: passed over.\n"
    assert f"Launched by hand, on this machine alone.\n{warning}" in result.stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"model", "output", "checkpoints"}
    assert (tmp_path / "run/model/adapter_model.safetensors").exists()
    assert (tmp_path / "run/output/data/report.html").exists()


@pytest.mark.parametrize("command", ["validate", "plan", pytest.param("doctor", marks=pytest.mark.long)])
def test_of_several_processes_on_a_node_the_first_speaks_and_all_end_alike(tmp_path, command):
    """An empty tree has nothing to look at."""
    environment = {**os.environ, "SAGEMAKER_BASE_DIR": str(tmp_path), "LLM_TRAINER_DATA_DIR": "/dev/null/data"}
    processes = [
        subprocess.Popen(
            [LLM_TRAINER, command],
            env=environment | set_by_srun(1, local_rank, num_local=2) | {"SLURM_JOB_ID": command},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for local_rank in (0, 1)
    ]
    told = [process.communicate()[0] for process in processes]
    assert told[0]
    assert not told[1]
    assert processes[0].returncode == processes[1].returncode


def test_validate_tells_of_strays_and_refuses_what_train_refuses(tmp_path):
    def validate(**variables):
        environment = {**os.environ, "SAGEMAKER_BASE_DIR": str(tmp_path), **variables}
        command = [LLM_TRAINER, "validate"]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout

    assert "warning  RANK=0 in the environment without WORLD_SIZE, MASTER_ADDR: passed over." in validate(RANK="0")
    assert "error    RANK=0, WORLD_SIZE=2 in the environment without MASTER" in validate(RANK="0", WORLD_SIZE="2")
