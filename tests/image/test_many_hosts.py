# SPDX-License-Identifier: Apache-2.0
"""One job in two containers on a network, as the service and the SDK's local mode run it: names resolve, no more."""

import subprocess
import uuid
from contextlib import ExitStack

import pytest

HOSTS = ["algo-1", "algo-2"]
THREE = [*HOSTS, "algo-3"]


@pytest.fixture
def network(image):
    name = f"llm-trainer-test-{uuid.uuid4().hex[:12]}"
    subprocess.run([image.docker, "network", "create", name], check=True, capture_output=True)
    yield name
    subprocess.run([image.docker, "network", "rm", name], check=False, capture_output=True)


@pytest.fixture
def make_hosts(make_tree):
    """The trees of two hosts of one job; the interface is one that does not exist, as in ModelTrainer's local mode."""

    def make(hosts=HOSTS, **hyperparameters):
        trees = {}
        for host in hosts:
            trees[host] = make_tree()
            trees[host].change(**{"per_device_train_batch_size": "4"} | hyperparameters)
            resources = {"current_host": host, "hosts": hosts, "network_interface_name": "ethwe"}
            trees[host].write("input/config/resourceconfig.json", resources)
        return trees

    return make


def options(network, host):
    return [f"--network={network}", f"--network-alias={host}", "--env=OMP_NUM_THREADS=1"]


def test_two_hosts_train_one_adapter(image, network, make_hosts):
    trees = make_hosts()
    with (
        image.start(trees["algo-2"].base_dir, "train", options=options(network, "algo-2")) as second,
        image.start(trees["algo-1"].base_dir, "train", options=options(network, "algo-1")) as first,
    ):
        assert first.end() == 0, first.log() + second.log()
        assert second.end() == 0, second.log()
        assert "global batch 8 rows = 4 a device x 2 devices" in first.log()
        assert "train_loss=" not in second.log()
    assert "adapter_model.safetensors" in trees["algo-1"].model_files
    assert not trees["algo-2"].model_files


def test_the_loss_of_a_host_ends_the_other_with_its_name(image, network, make_hosts):
    trees = make_hosts(num_train_epochs="10000")
    with (
        image.start(trees["algo-1"].base_dir, "train", options=options(network, "algo-1")) as first,
        image.start(trees["algo-2"].base_dir, "train", options=options(network, "algo-2")) as second,
    ):
        first.wait_for("train_loss=")
        second.call("kill")
        assert first.end() == 1, first.log()
    assert trees["algo-1"].failure.startswith("Host algo-2 no longer answers")


@pytest.mark.parametrize("killed", THREE)
def test_two_hosts_go_on_without_the_third(image, network, make_hosts, tmp_path, killed):
    """All have one folder of checkpoints, as on a file system of the cluster; the first host may be the lost one."""
    trees = make_hosts(
        THREE,
        per_device_train_batch_size=None,
        global_batch_size="12",
        num_train_epochs="4",
        save_steps="1",
        min_hosts="2",
        max_restarts="1",
        host_timeout_seconds="10",
        checkpoint_dir="/shared/checkpoints",
    )
    (tmp_path / "shared").mkdir(mode=0o777)
    shared = f"--volume={tmp_path / 'shared'}:/shared"
    with ExitStack() as stack:
        containers = {
            host: stack.enter_context(
                image.start(trees[host].base_dir, "train", options=[*options(network, host), shared])
            )
            for host in THREE
        }
        containers["algo-1"].wait_for("step=2;")
        containers[killed].call("kill")
        left = [host for host in THREE if host != killed]
        for host in left:
            assert containers[host].end() == 0, "\n".join(containers[name].log() for name in left)
        first = containers[left[0]].log()
    assert f"Host {killed} no longer answers" in first
    assert "Attempt 2: the workers start again from the newest checkpoint." in first
    manifest = trees[left[0]].manifest
    assert (manifest["num_steps"], manifest["world_size"]) == (12, 2)
    assert not trees[left[1]].model_files


def test_a_stop_of_both_hosts_ends_them_together(image, network, make_hosts):
    trees = make_hosts(num_train_epochs="10000")
    with (
        image.start(trees["algo-1"].base_dir, "train", options=options(network, "algo-1")) as first,
        image.start(trees["algo-2"].base_dir, "train", options=options(network, "algo-2")) as second,
    ):
        first.wait_for("train_loss=")
        command = [image.docker, "stop", "--time=120", first.name, second.name]
        subprocess.run(command, check=True, capture_output=True)
        assert [first.end(), second.end()] == [0, 0], first.log() + second.log()
    assert trees["algo-1"].manifest["stopped"]
    assert trees["algo-1"].checkpoints[-1] == trees["algo-1"].manifest["num_steps"]
