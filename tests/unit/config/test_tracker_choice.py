# SPDX-License-Identifier: Apache-2.0
"""Which trackers are on, and what their libraries are told."""

import os
import subprocess
import sys

import pytest
from sagemaker_mlflow.exceptions import MlflowSageMakerException
from sagemaker_mlflow.mlflow_sagemaker_helpers import SageMakerMLflowHostMetadataProvider

from llm_trainer.config.checks import find_contradictions
from llm_trainer.config.schema import Settings
from llm_trainer.config.tracker_choice import build_tracker_variables, choose_trackers, find_idle_project
from llm_trainer.trackers.run_identity import RunIdentity, recall_run, remember_run

KEY = {"WANDB_API_KEY": "key"}
ARN = "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-app/app-1"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "WANDB_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.parametrize(
    ("given", "variables", "trackers"),
    [
        ({}, {}, []),
        ({"mlflow_uri": "mlruns"}, {}, ["mlflow"]),
        ({}, {"MLFLOW_TRACKING_URI": ARN}, ["mlflow"]),
        ({}, {"MLFLOW_TRACKING_ARN": ARN}, ["mlflow"]),
        ({}, KEY, ["wandb"]),
        ({"wandb_token": "key", "mlflow_uri": ARN}, {}, ["mlflow", "wandb"]),
        ({"wandb_project": "project"}, {}, []),
        ({}, {"WANDB_MODE": "offline"}, ["wandb"]),
        ({}, {**KEY, "WANDB_MODE": "disabled"}, []),
        ({"report_to": "none", "mlflow_uri": ARN}, KEY, []),
        ({"report_to": [], "mlflow_uri": ARN}, KEY, []),
        ({"report_to": None, "mlflow_uri": ARN}, {}, ["mlflow"]),
        ({"report_to": ["tensorboard", "wandb"], "mlflow_uri": ARN}, KEY, ["tensorboard", "wandb"]),
    ],
)
def test_what_is_configured_is_on_unless_report_to_says_otherwise(given, variables, trackers):
    assert choose_trackers(Settings(**given).tracking, variables) == trackers


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"report_to": "mlflow"}, "report_to='mlflow' without an address: give mlflow_uri"),
        ({"report_to": ["wandb"]}, "without a W&B key: give WANDB_API_KEY"),
        ({"report_to": "comet"}, "it must be among mlflow, wandb, tensorboard, none"),
        ({"mlflow_uri": "htp://me:secret@host"}, "mlflow_uri='htp://***@host' is no address that MLflow knows"),
        ({"track_model": True}, "track_model=true without a tracker"),
    ],
)
def test_what_cannot_be_tracked_is_told_before(given, part):
    (problem,) = find_contradictions(Settings(**given))
    assert part in problem


@pytest.mark.parametrize("uri", ["mlruns", "file:///a", "sqlite:///a.db", "http://a:5000", "mysql+pymysql://a/b", ARN])
def test_addresses_that_mlflow_takes_are_taken(uri):
    assert not list(find_contradictions(Settings(mlflow_uri=uri, report_to="mlflow")))


@pytest.mark.parametrize(
    "arn",
    [
        ARN,
        "arn:aws-us-gov:sagemaker:us-gov-west-1:123456789012:mlflow-tracking-server/my-runs",
        "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-tracking-server",
        "arn:aws:sagemaker:eu-west-1:123456789012:mlflow-tracking-server/",
        "arn:aws:sagemaker:eu-west-1:123456789012:endpoint/a",
        "arn:aws-cn:sagemaker:cn-north-1:123456789012:mlflow-app/a",
        "arn:aws:s3:eu-west-1:123456789012:mlflow-app/a",
        "arn:aws:sagemaker",
    ],
)
def test_an_arn_is_taken_where_sagemakers_plugin_takes_it(arn):
    host = SageMakerMLflowHostMetadataProvider()
    try:
        host.set_arn(arn)
        host.construct_tracking_server_url()
    except (MlflowSageMakerException, IndexError):
        (problem,) = find_contradictions(Settings(mlflow_uri=arn))
        assert problem.startswith(f"mlflow_uri={arn!r} is no address that MLflow knows: ")
    else:
        assert not list(find_contradictions(Settings(mlflow_uri=arn)))


def test_a_project_without_a_key_is_told_and_a_netrc_is_a_key(tmp_path):
    settings = Settings(wandb_project="project").tracking
    assert "W&B stays off" in next(find_idle_project(settings))
    (tmp_path / ".netrc").touch(0o600)  # Python reads no other's
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    assert not list(find_idle_project(settings))
    assert choose_trackers(settings, {}) == ["wandb"]


def test_the_password_of_an_address_becomes_a_variable():
    variables = build_tracker_variables(Settings(mlflow_uri="https://me:p%40ss@host:5000/path").tracking, {})
    assert variables["MLFLOW_TRACKING_URI"] == "https://host:5000/path"
    assert (variables["MLFLOW_TRACKING_USERNAME"], variables["MLFLOW_TRACKING_PASSWORD"]) == ("me", "p@ss")


def test_files_are_named_by_their_whole_path(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for uri, whole in (
        ("mlruns", f"{tmp_path}/mlruns"),
        ("sqlite:///a.db", f"sqlite:///{tmp_path}/a.db"),
        ("sqlite:////b/a.db", "sqlite:////b/a.db"),
        ("file:runs", f"file:{tmp_path}/runs"),
        ("file:///b/runs", "file:///b/runs"),
        ("http://host", "http://host"),
    ):
        assert build_tracker_variables(Settings(mlflow_uri=uri).tracking, {})["MLFLOW_TRACKING_URI"] == whole
    assert build_tracker_variables(Settings().tracking, {"WANDB_DIR": "runs"})["WANDB_DIR"] == f"{tmp_path}/runs"


def test_a_run_is_recalled_where_it_was_remembered(tmp_path, capsys):
    identity = RunIdentity("1", 2.5)
    assert recall_run(tmp_path, "mlflow") is None
    remember_run(tmp_path / "checkpoints", "mlflow", identity)
    assert recall_run(tmp_path / "checkpoints", "mlflow") == identity
    assert recall_run(tmp_path / "checkpoints", "wandb") is None
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
    (tmp_path / "checkpoints/tracked-run-mlflow.json").write_text("{")
    assert recall_run(tmp_path / "checkpoints", "mlflow") is None
    remember_run(None, "mlflow", identity)
    (tmp_path / "file").touch()
    remember_run(tmp_path / "file", "mlflow", identity)
    assert "a resumed job begins another run" in capsys.readouterr().err


def test_the_reporter_imports_no_tracker_that_is_off():
    code = (
        "import sys, llm_trainer.trackers.reporter\n"
        "print(sorted({'torch', 'mlflow', 'wandb', 'tensorboardX', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


HIDING = """
import os, sys
from llm_trainer.config.schema import Settings
from llm_trainer.config.tracker_choice import configure_trackers
settings = Settings(mlflow_uri="http://host", mlflow_register_model={name!r})
configure_trackers(settings.tracking, settings.output)
print([name for name in ("wandb", "mlflow") if name in sys.modules], os.environ.get("MLFLOW_TRACKING_URI"))
sys.modules["trl"] = sys
try:
    configure_trackers(settings.tracking, settings.output)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("name", "hidden"), [(None, "['wandb', 'mlflow'] None"), ("registered", "['wandb'] http://host")]
)
def test_a_worker_sees_no_tracker_but_the_registry_and_too_late_is_an_error(name, hidden):
    code = HIDING.format(name=name)
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [hidden, "Trackers must be hidden before trl is imported."]
