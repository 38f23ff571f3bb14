# SPDX-License-Identifier: Apache-2.0
"""A tiny model and a fake NVML made once, and an /opt/ml tree with the model for every test."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock

from llm_trainer.common.redaction import noted
from support.fake_hub import FakeHub
from support.sagemaker_tree import HOSTS, HYPERPARAMETERS, ROWS, RunningJob, SageMakerTree
from support.schedule import (  # noqa: F401  # hooks, which pytest finds here
    pytest_addoption,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_configure_node,
    pytest_runtest_setup,
    pytest_terminal_summary,
)
from support.tiny_model import build_tiny_model


@pytest.fixture(autouse=True)
def forget_secrets() -> Iterator[None]:
    """What one test tells as a secret is none in the next one."""
    yield
    noted.clear()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def make_tree(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path):
    """Makes trees of a complete job: channels model, train (.jsonl) and validation (.json)."""

    def make() -> SageMakerTree:
        tree = SageMakerTree(tmp_path_factory.mktemp("opt-ml"))
        shutil.copytree(tiny_model, tree.base_dir / "input/data/model")
        tree.write("input/data/train/train.jsonl", "".join(f"{line}\n" for line in map(json.dumps, ROWS)))
        tree.write("input/data/validation/validation.json", ROWS[:4])
        tree.write_job(HYPERPARAMETERS, ("model", "train", "validation"))
        return tree

    return make


@pytest.fixture
def impatient_hub(monkeypatch):
    """huggingface_hub asks a Hub that does not answer five times, and waits half a minute in all."""
    from huggingface_hub.utils import _http

    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda seconds: None))


@pytest.fixture
def fake_hub(impatient_hub, tiny_model, tmp_path, monkeypatch):
    """A Hub that huggingface_hub, which read its environment when it was imported, takes for its own."""
    from huggingface_hub import constants  # few tests need it, and it takes half a second to import

    server = FakeHub(tiny_model)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    yield server
    server.close()


@pytest.fixture
def start():
    """Starts the jobs of trees, and ends what a failed test leaves running."""
    jobs = []

    def start_job(tree: SageMakerTree, *arguments: str, command: Sequence[str] = ()) -> RunningJob:
        jobs.append(tree.start(*arguments, command=command))
        return jobs[-1]

    yield start_job
    for job in jobs:
        job.process.kill()
        job.process.wait()
        job.process.stdout.close()


@pytest.fixture
def ports_of_hosts() -> Iterator[None]:
    """A job's hosts talk on ports 7777 and 7778: one test at a time has them on this machine."""
    with FileLock(Path(tempfile.gettempdir()) / "llm-trainer-tests-of-hosts.lock"):
        yield


@pytest.fixture
def make_hosts(make_tree, ports_of_hosts):
    """Makes the trees of one job's hosts, which addresses of the loopback interface stand for."""

    def make(hosts=HOSTS, groups=None, **hyperparameters) -> list[SageMakerTree]:
        trees = [make_tree() for _ in hosts]
        for host, tree in zip(hosts, trees, strict=True):
            tree.environment["OMP_NUM_THREADS"] = "1"
            tree.change(**{"per_device_train_batch_size": "4", "host_timeout_seconds": "60"} | hyperparameters)
            resources = {"current_host": host, "hosts": hosts, "network_interface_name": "lo"}
            tree.write("input/config/resourceconfig.json", resources | ({"instance_groups": groups} if groups else {}))
        return trees

    return make


@pytest.fixture
def tree(make_tree) -> SageMakerTree:
    return make_tree()


@pytest.fixture(scope="session")
def fake_nvml(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, str]]:
    """Makes the environment variables with which a child process finds `gpus` GPUs and a driver that are not there."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler `cc` here to build tests/support/fake_nvml/nvml.c with")
    folder = tmp_path_factory.mktemp("fake-nvml")
    source = Path(__file__).parent / "support/fake_nvml/nvml.c"
    library = folder / "libnvidia-ml.so.1"
    subprocess.run([compiler, "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)

    def make(gpus: int = 1, driver: str = "580.95.05", cuda: str = "13.0") -> dict[str, str]:
        earlier = os.environ.get("LD_LIBRARY_PATH")
        return {
            "LD_LIBRARY_PATH": f"{folder}:{earlier}" if earlier else str(folder),
            "FAKE_NVML_GPUS": str(gpus),
            "FAKE_NVML_DRIVER": driver,
            "FAKE_NVML_CUDA": cuda,
        }

    return make
