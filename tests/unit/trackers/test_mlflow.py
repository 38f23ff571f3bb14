# SPDX-License-Identifier: Apache-2.0
"""What MLflow is sent fits its limits; tests/integration/test_tracking.py sends it to a server."""

import json
from types import SimpleNamespace

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.dbmodels.models import SqlExperiment, SqlRun
from mlflow.utils import validation
from PIL import Image

from llm_trainer.config.tracker_names import LIMITS, takes_name
from llm_trainer.readers.thumbnails import write_thumbnail
from llm_trainer.trackers.events import DataSet
from llm_trainer.trackers.feed import TrackerUsageError
from llm_trainer.trackers.mlflow import DIGEST_CHARACTERS, FORBIDDEN, MlflowTracker, describe_data_set, split_batches
from support.journals import write_listed_result
from support.tiny_processors import draw


@pytest.mark.parametrize(
    ("split", "files", "context", "source_type"),
    [("train", [{"uri": "s3://b/a"}], "training", "s3"), ("validation", [{"uri": None}], "validation", "local")],
)
def test_a_split_is_an_input_of_the_run(split, files, context, source_type):
    data = DataSet(split, "ab" * 40, {"num_files": 1, "files": files}, {"rows": 3})
    described = describe_data_set(data)
    assert (described.dataset.name, described.dataset.source_type) == (split, source_type)
    assert described.dataset.digest == ("ab" * 40)[:DIGEST_CHARACTERS]
    assert json.loads(described.dataset.profile) == {"rows": 3}
    assert [(tag.key, tag.value) for tag in described.tags] == [("mlflow.data.context", context)]


def test_batches_hold_all_items_in_order():
    assert list(split_batches(range(5), 2)) == [[0, 1], [2, 3], [4]]
    assert list(split_batches([], 2)) == []


def test_names_keep_what_mlflow_takes():
    assert FORBIDDEN.sub("_", "gpu/algo-1/0/memory (GiB)!") == "gpu/algo-1/0/memory _GiB__"


CHECKS = {
    "MLFLOW_EXPERIMENT_NAME": validation._validate_experiment_name,
    "MLFLOW_RUN_ID": validation._validate_run_id,
    "MLFLOW_EXPERIMENT_ID": validation._validate_experiment_id,
    None: validation._validate_model_name,  # of the registry
}


def is_taken_by_mlflow(variable, name):
    try:
        CHECKS[variable](name)
    except MlflowException:
        return False
    return True


@pytest.mark.parametrize("limit", [limit for limit in LIMITS if limit.variable in CHECKS])
def test_mlflow_takes_every_name_that_is_taken(limit):
    names = [f"a{chr(code)}b" for code in range(1, 128)] + ["a" * limit.max_characters, "a b", ".", "a"]
    assert all(is_taken_by_mlflow(limit.variable, name) for name in names if takes_name(limit, name))


def test_names_fit_the_columns_of_mlflows_database():
    widths = {limit.variable: limit.max_characters for limit in LIMITS}
    assert widths["MLFLOW_EXPERIMENT_NAME"] == SqlExperiment.name.type.length
    assert widths["MLFLOW_RUN_NAME"] == SqlRun.name.type.length


def test_only_the_result_is_uploaded(tmp_path):
    tracker, sent = MlflowTracker(None, tmp_path), {}
    tracker.run_id = "1"
    tracker.client = SimpleNamespace(
        list_artifacts=lambda *_: [], log_artifact=lambda _, file, place: sent.setdefault(file, place)
    )
    listed = write_listed_result(tmp_path)
    tracker.upload_model(tmp_path)
    places = ["model/adapters/trained", "model", "model"]
    assert sent == {str(tmp_path / name): place for name, place in zip(listed, places, strict=True)}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A real store, whose experiment 1, `gone`, has been deleted. To make one takes seconds."""
    uri = f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"
    client = MlflowClient(uri)
    client.delete_experiment(client.create_experiment("gone", "file:///nowhere"))
    client.delete_run(client.create_run("0", tags={"mlflow.runName": "gone"}).info.run_id)
    return uri


@pytest.fixture
def begin(store, tmp_path, monkeypatch):
    """Begins a run in the store."""
    monkeypatch.chdir(tmp_path)

    def start(**variables: str) -> str:
        for name, value in {"MLFLOW_TRACKING_URI": store, **variables}.items():
            monkeypatch.setenv(name, value)
        job = {"kind": "job", "time": 1.0, "settings": {}, "environment": {}}
        return MlflowTracker(None, tmp_path).begin(job)

    return start


@pytest.mark.long
def test_a_run_that_has_been_deleted_is_told_as_that(begin, store):
    (run,) = MlflowClient(store).search_runs(["0"], run_view_type=ViewType.DELETED_ONLY)
    sentence = rf"the run MLFLOW_RUN_ID='{run.info.run_id}' has been deleted: restore it \(.*\), or leave MLFLOW_RUN_ID"
    with pytest.raises(TrackerUsageError, match=sentence):
        begin(MLFLOW_RUN_ID=run.info.run_id)


@pytest.mark.long
@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        (
            "MLFLOW_EXPERIMENT_NAME",
            "gone",
            r"the experiment 'gone' has been deleted: restore it \(.* -x 1`\)",
        ),
        ("MLFLOW_EXPERIMENT_ID", "1", "the experiment '1' has been deleted: restore it"),
        ("MLFLOW_EXPERIMENT_ID", "77", "MLFLOW_EXPERIMENT_ID='77' is no experiment of this server: correct it"),
        ("MLFLOW_RUN_ID", "nonsense", "MLFLOW_RUN_ID='nonsense' is no run of this server: correct it, or leave it out"),
    ],
)
def test_what_the_server_does_not_have_is_told_as_that(begin, variable, value, sentence):
    with pytest.raises(TrackerUsageError, match=sentence):
        begin(**{variable: value})


def test_answers_become_one_table_with_images_even_after_a_failure(tmp_path):
    tracker, image = MlflowTracker(None, tmp_path), {"name": "cat.png", "thumbnail": write_thumbnail(draw(40, 30))}
    tracker.client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = tracker.client.create_experiment("answers", str(tmp_path / "artifacts"))
    tracker.run_id, tracker.parameters = tracker.client.create_run(experiment).info.run_id, {}
    tracker.started = 0.0
    record = {"time": 1.0, "kind": "generation", "prompt": "What is it?", "after": "A cat.", "images": [image]}
    tracker.send([record])
    with pytest.raises(OSError):
        tracker.upload([tmp_path / "missing"])
    for _ in range(2):
        tracker.upload([])
    table = json.loads((tmp_path / "artifacts" / tracker.run_id / "artifacts/sample_answers.json").read_text())
    ((split, prompt, reference, before, after, shown),) = table["data"]
    assert (split, prompt, reference, before, after) == ("", "What is it?", "", "", "A cat.")
    assert Image.open(tmp_path / "artifacts" / tracker.run_id / "artifacts" / shown["filepath"]).size == (40, 30)
