# SPDX-License-Identifier: Apache-2.0
"""The container reads what SageMaker, its SDKs' local modes and a plain `docker run` put there."""

import json
from pathlib import Path

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.config.environment import read_environment


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    (tmp_path / "input/config").mkdir(parents=True)
    (tmp_path / "input/data").mkdir()
    return tmp_path


def write(base_dir, name, value):
    (base_dir / "input/config" / name).write_text(value if isinstance(value, str) else json.dumps(value))


def test_an_empty_tree_is_one_local_host(base_dir):
    environment = read_environment()
    assert environment.hosts == ("localhost",)
    assert environment.node_rank == 0
    assert environment.channels == {}
    assert environment.hyperparameters == {}


def test_a_hosts_rank_is_its_position(base_dir):
    write(base_dir, "resourceconfig.json", {"current_host": "algo-2", "hosts": ["algo-1", "algo-10", "algo-2"]})
    assert read_environment().node_rank == 2


def test_channels_are_those_listed_and_those_found(base_dir):
    write(base_dir, "inputdataconfig.json", {"train": {"TrainingInputMode": "File"}})
    (base_dir / "input/data/model").mkdir()
    assert set(read_environment().channels) == {"train", "model"}


def test_pipe_mode_is_refused(base_dir):
    write(base_dir, "inputdataconfig.json", {"train": {"TrainingInputMode": "Pipe"}})
    with pytest.raises(UserError, match=r"train uses TrainingInputMode=Pipe.*use File or FastFile"):
        read_environment()


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "{'a': 1}"])
def test_a_configuration_file_that_is_no_json_object_is_named(base_dir, text):
    write(base_dir, "hyperparameters.json", text)
    with pytest.raises(UserError, match=r"hyperparameters\.json"):
        read_environment()


def test_a_host_that_is_not_listed_is_told(base_dir):
    write(base_dir, "resourceconfig.json", {"current_host": "algo-3", "hosts": ["algo-1", "algo-2"]})
    with pytest.raises(UserError, match="current_host='algo-3'"):
        read_environment()


def write_groups(base_dir, current_host, *groups):
    """A heterogeneous cluster of (instance type, hosts) groups."""
    named = [
        {"instance_group_name": f"group-{number}", "instance_type": kind, "hosts": hosts}
        for number, (kind, hosts) in enumerate(groups)
    ]
    hosts = sorted(host for _, group in groups for host in group)
    resources = {"current_host": current_host, "hosts": hosts, "instance_groups": named}
    write(base_dir, "resourceconfig.json", resources)


def test_the_gpu_group_of_a_heterogeneous_cluster_trains_in_its_own_order(base_dir):
    write_groups(base_dir, "algo-1", ("ml.c5.18xlarge", ["algo-2"]), ("ml.p4d.24xlarge", ["algo-3", "algo-1"]))
    environment = read_environment()
    assert environment.hosts == ("algo-3", "algo-1")
    assert environment.node_rank == 1
    assert environment.other_hosts == ("algo-2",)


def test_a_host_of_another_group_does_not_train(base_dir):
    write_groups(base_dir, "algo-2", ("ml.c5.18xlarge", ["algo-2"]), ("ml.g6e.2xlarge", ["algo-3", "algo-1"]))
    assert not read_environment().trains


def test_without_gpus_the_first_of_the_largest_groups_trains(base_dir):
    write_groups(base_dir, "algo-1", ("ml.c5.xlarge", ["algo-1"]), ("ml.m5.xlarge", ["algo-2"]))
    assert read_environment().hosts == ("algo-1",)


def test_one_group_is_all_hosts_in_the_order_of_hosts(base_dir):
    group = {
        "instance_group_name": "homogeneousCluster",
        "instance_type": "ml.c5.xlarge",
        "hosts": ["algo-2", "algo-1"],
    }
    resources = {"current_host": "algo-1", "hosts": ["algo-1", "algo-2"], "instance_groups": [group]}
    write(base_dir, "resourceconfig.json", resources)
    assert read_environment().hosts == ("algo-1", "algo-2")


@pytest.mark.parametrize("hosts", ["algo-1", [1], {"a": 1}])
def test_hosts_that_are_no_list_of_names_are_told(base_dir, hosts):
    write(base_dir, "resourceconfig.json", {"hosts": hosts})
    with pytest.raises(UserError, match=r"hosts=.*write a list of host names"):
        read_environment()


def test_the_checkpoint_folder_is_the_one_that_is_synchronized(base_dir):
    assert read_environment().checkpoint_dir == base_dir / "checkpoints"
    write(base_dir, "checkpointconfig.json", {"S3Uri": "s3://bucket/prefix", "LocalPath": "/opt/ml/elsewhere"})
    assert read_environment().checkpoint_dir == Path("/opt/ml/elsewhere")


def test_a_channel_is_sharded_where_several_hosts_share_its_files(base_dir):
    write(base_dir, "inputdataconfig.json", {"train": {"S3DistributionType": "ShardedByS3Key"}, "validation": {}})
    assert read_environment().sharded_channels == frozenset()
    write(base_dir, "resourceconfig.json", {"current_host": "algo-1", "hosts": ["algo-1", "algo-2"]})
    assert read_environment().sharded_channels == {"train"}


@pytest.mark.parametrize("name", ["model", "adapter", "rewards"])
def test_a_channel_of_which_every_host_needs_all_files_is_not_sharded(base_dir, name):
    write(base_dir, "inputdataconfig.json", {name: {"S3DistributionType": "ShardedByS3Key"}})
    write(base_dir, "resourceconfig.json", {"current_host": "algo-1", "hosts": ["algo-1", "algo-2"]})
    with pytest.raises(UserError, match=rf"Channel {name} uses S3DistributionType=ShardedByS3Key.*use FullyReplicated"):
        read_environment()


@pytest.mark.parametrize(
    "groups", [{}, "x", [None], [{"hosts": "algo-1"}], [{"hosts": [None]}], [{"instance_type": 5}]]
)
def test_instance_groups_that_are_none_are_told(base_dir, groups):
    write(base_dir, "resourceconfig.json", {"current_host": "algo-1", "hosts": ["algo-1"], "instance_groups": groups})
    if groups:
        with pytest.raises(UserError, match=r"^resourceconfig\.json has "):
            read_environment()
    else:
        assert read_environment().hosts == ("algo-1",)


def test_a_group_without_a_type_or_hosts_is_one_without_gpus(base_dir):
    groups = [
        {"instance_group_name": "a", "instance_type": None, "hosts": ["algo-1"]},
        {"instance_group_name": "b", "hosts": None},
        {"instance_group_name": "c", "instance_type": "ml.g5.xlarge", "hosts": ["algo-2"]},
    ]
    hosts = ["algo-1", "algo-2"]
    write(base_dir, "resourceconfig.json", {"current_host": "algo-1", "hosts": hosts, "instance_groups": groups})
    assert read_environment().hosts == ("algo-2",)


@pytest.mark.parametrize("key", ["network_interface_name", "current_instance_type"])
def test_a_name_that_is_no_text_is_told(base_dir, key):
    write(base_dir, "resourceconfig.json", {"current_host": "algo-1", "hosts": ["algo-1"], key: [5]})
    with pytest.raises(UserError, match=rf"resourceconfig\.json has {key}=\[5\]: write a text"):
        read_environment()


def test_a_checkpoint_path_that_is_no_text_is_told(base_dir):
    write(base_dir, "checkpointconfig.json", {"LocalPath": 5})
    with pytest.raises(UserError, match=r"checkpointconfig\.json has LocalPath=5"):
        read_environment()
