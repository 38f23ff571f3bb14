# SPDX-License-Identifier: Apache-2.0
"""The container reads what SageMaker, its SDKs' local modes and a plain `docker run` put there."""

import json

import pytest

from llm_trainer.environment import read_environment
from llm_trainer.errors import UserError


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
