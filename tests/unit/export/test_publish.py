# SPDX-License-Identifier: Apache-2.0
"""Pushing to a Hub and registering in MLflow, each a real server on this machine."""

import json
import shutil

import pytest
from huggingface_hub import constants

from llm_trainer.common import hub
from llm_trainer.common.errors import UserError
from llm_trainer.config.checks import find_contradictions
from llm_trainer.config.schema import Settings
from llm_trainer.config.secret_references import read_secret_variables
from llm_trainer.export import publish
from llm_trainer.export.base_source import BaseSource
from llm_trainer.model.tokenizer_files import list_tokenizer_files
from llm_trainer.trackers.run_identity import leave_run
from support.fake_hub import MODEL, FakeHub
from support.mlflow_server import MlflowServer

TOKEN = "hf_secretOfThePush"
PUSH = {"push_to_hub": True, "hub_model_id": MODEL}


@pytest.fixture
def fake_hub(tiny_model, monkeypatch):
    server = FakeHub(tiny_model)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "FIRST_WAIT_SECONDS", 0.05)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


@pytest.fixture
def artefacts(tmp_path):
    folder = tmp_path / "model"
    (folder / "adapters/trained").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlibrary_name: peft\n---\n")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 100)
    (folder / "adapters/trained/adapter_model.safetensors").write_bytes(bytes(range(256)) * 100)
    list_all(folder)
    return folder


def list_all(folder):
    """Have a manifest list all files of a folder."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    (folder / "training_manifest.json").write_text(json.dumps({"files": ["training_manifest.json", *names]}))
    return folder


def refuse(action, *arguments) -> str:
    with pytest.raises(UserError) as information:
        action(*arguments)
    assert TOKEN not in str(information.value)
    return str(information.value)


def describe(model_dir):
    tokenizer = list_tokenizer_files(model_dir)
    return publish.collect_artefacts(model_dir, "LlamaForCausalLM", BaseSource(None, None), tokenizer)


def test_a_push_is_one_commit_of_the_whole_result_and_of_nothing_else(fake_hub, artefacts, capsys, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (artefacts / "link").symlink_to(tmp_path / "secret")
    (artefacts / ".llm-trainer-export1").mkdir()
    (artefacts / ".llm-trainer-export1/left").touch()
    (artefacts / "notes.txt").write_text("of the user")
    settings = Settings(**PUSH, hub_private_repo=True)
    publish.prepare_push(settings.output)
    assert fake_hub.created == [{"name": "model", "organization": "tiny", "visibility": "private"}]
    publish.publish(settings.output, settings.tracking, describe(artefacts))
    (files,) = fake_hub.commits
    assert files == {
        name: (artefacts / name).read_bytes()
        for name in (
            *("README.md", "training_manifest.json", "adapter_model.safetensors"),
            "adapters/trained/adapter_model.safetensors",
        )
    }
    assert f"Pushed to {fake_hub.endpoint}/{MODEL}/commit/" in capsys.readouterr().out
    assert fake_hub.tokens <= {f"Bearer {TOKEN}", None}


def test_the_pushs_own_token_and_branch(fake_hub, artefacts, monkeypatch):
    settings = Settings(**PUSH, hub_token="hf_other", hub_revision="trial")
    for name, value in read_secret_variables(settings.secrets, {}).items():
        monkeypatch.setenv(name, value)
    publish.prepare_push(settings.output)
    assert fake_hub.created[-1] == {"branch": "trial"}
    publish.push_to_hub(settings.output, describe(artefacts))
    assert f"POST /api/models/{MODEL}/commit/trial" in fake_hub.requests
    assert fake_hub.tokens <= {"Bearer hf_other", None}


def test_a_folder_whose_manifest_lists_nothing_is_not_pushed(fake_hub, artefacts):
    (artefacts / "training_manifest.json").unlink()
    settings = Settings(**PUSH)
    sentence = refuse(publish.publish, settings.output, settings.tracking, describe(artefacts))
    assert sentence.endswith("has no training_manifest.json that lists the result: push or register its files by hand.")
    assert fake_hub.commits == []


def test_without_being_asked_nothing_is_pushed(fake_hub, artefacts):
    publish.prepare_push(Settings().output)
    publish.publish(Settings().output, Settings().tracking, describe(artefacts))
    assert fake_hub.requests == []


def test_a_token_that_may_only_read_is_told_before_training(fake_hub):
    fake_hub.role = "read"
    assert "the given token may only read" in refuse(publish.prepare_push, Settings(**PUSH).output)


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (401, "the Hub does not know the token; give a valid one as HF_TOKEN."),
        (403, "cannot be pushed to (403): give a token that may write there, or a name of your own."),
        (503, "could not be pushed to (Server error '503"),
    ],
)
def test_what_forbids_a_push_is_told_before_training(fake_hub, monkeypatch, status, sentence):
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.5)
    fake_hub.repository = "nobody/knows"  # or create_repo would take it for one that is there
    fake_hub.refuse(status)
    assert sentence in refuse(publish.prepare_push, Settings(**PUSH).output)


def test_a_busy_hub_is_pushed_to_again(fake_hub, artefacts, capsys):
    fake_hub.refused = "/commit/"
    fake_hub.refuse(429, times=1)
    publish.push_to_hub(Settings(**PUSH).output, describe(artefacts))
    assert len(fake_hub.commits) == 1
    assert f"Pushing to {MODEL}: 429" in capsys.readouterr().out


def test_a_push_that_fails_leaves_the_artefacts(fake_hub, artefacts):
    fake_hub.refused = "/upload/"
    fake_hub.refuse(403)
    before = sorted(artefacts.rglob("*"))
    settings = Settings(**PUSH)
    sentence = refuse(publish.publish, settings.output, settings.tracking, describe(artefacts))
    assert "(403)" in sentence
    assert sentence.endswith(f"the artefacts are in {artefacts}: push them by hand.")
    assert sorted(artefacts.rglob("*")) == before
    assert fake_hub.commits == []


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"push_to_hub": True}, "hub_model_id=null"),
        ({**PUSH, "hub_strategy": "checkpoint"}, "hub_strategy=checkpoint: the result is pushed once"),
        ({**PUSH, "hub_always_push": True}, "hub_always_push=true: the result is pushed once"),
        ({"hub_revision": "x"}, "hub_revision without push_to_hub=true"),
        ({"mlflow_register_model": "m"}, "mlflow_register_model='m' without mlflow_uri"),
    ],
)
def test_what_cannot_be_honoured_is_refused(monkeypatch, given, part):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (problem,) = find_contradictions(Settings(**given))
    assert part in problem


def test_a_push_needs_a_token(monkeypatch):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert "without a token" in next(find_contradictions(Settings(**PUSH)))


def test_large_artefacts_are_better_left_unpacked(tmp_path):
    assert publish.advise_compression(tmp_path) is None
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.truncate(6 * 10**9)  # a hole: no disk is needed
    advice = publish.advise_compression(tmp_path)
    assert "6.0 GB" in advice
    assert "may take 10 billed minutes" in advice
    assert "CompressionType NONE" in advice


@pytest.fixture
def result(tiny_model, tmp_path):
    return list_all(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow")).start()
    yield server.uri
    server.stop()


def test_the_artefacts_become_a_version_of_a_registered_model(mlflow_server, tiny_model, monkeypatch, tmp_path):
    import mlflow
    import mlflow.transformers

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("LLM_TRAINER_SCRATCH", str(tmp_path))
    run = mlflow.MlflowClient().create_run("0")  # the reporter's
    leave_run(tmp_path, run.info.run_id)
    model_dir = tmp_path / "model"
    shutil.copytree(tiny_model, model_dir)
    (model_dir / "additional_chat_templates").mkdir()
    (model_dir / "additional_chat_templates/tool_use.jinja").write_text("tools")
    for name in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"):  # a copied base's may have more
        (model_dir / name).write_text("{}")
    list_all(model_dir)
    (model_dir / "tokenizer_of_the_user.json").write_text("{}")
    settings = Settings(mlflow_uri=mlflow_server, mlflow_register_model="sums")
    versions = [
        publish.register_in_mlflow(settings.output.mlflow_register_model, settings.tracking, describe(model_dir))
        for _ in range(2)
    ]
    assert versions == ["1", "2"]
    version = mlflow.MlflowClient().get_model_version("sums", "1")
    assert version.run_id == run.info.run_id
    assert version.status == "READY"
    place = tmp_path / "loaded"
    place.mkdir()
    loaded = mlflow.transformers.load_model("models:/sums/1", return_type="components", dst_path=str(place))
    assert type(loaded["model"]).__name__ == "LlamaForCausalLM"
    assert loaded["tokenizer"].chat_template["tool_use"] == "tools"
    of_the_model = {"config.json", "generation_config.json", "model.safetensors", "training_manifest.json"}
    assert not list(place.rglob("tokenizer_of_the_user.json"))
    sent = {path.name for path in (place / "components/tokenizer").iterdir()}
    assert sent == {path.name for path in model_dir.iterdir()} - of_the_model - {"tokenizer_of_the_user.json"}


def test_without_a_run_of_the_job_the_model_gets_its_own(mlflow_server, result, monkeypatch, tmp_path):
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    monkeypatch.setenv("LLM_TRAINER_SCRATCH", str(tmp_path))
    monkeypatch.setattr(publish, "RUN_PATIENCE_SECONDS", 0)
    settings = Settings(mlflow_uri=mlflow_server, mlflow_register_model="own", run_name="its own")
    assert publish.register_in_mlflow(settings.output.mlflow_register_model, settings.tracking, describe(result)) == "1"
    run = mlflow.get_run(mlflow.MlflowClient().get_model_version("own", "1").run_id)
    assert (run.info.run_name, run.info.status) == ("its own", "FINISHED")


def test_a_server_that_is_gone_is_told(result, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("LLM_TRAINER_SCRATCH", str(tmp_path))
    monkeypatch.setattr(publish, "RUN_PATIENCE_SECONDS", 0)
    settings = Settings(mlflow_uri="http://127.0.0.1:9", mlflow_register_model="sums")
    sentence = refuse(
        publish.register_in_mlflow, settings.output.mlflow_register_model, settings.tracking, describe(result)
    )
    assert f"the artefacts are in {result}" in sentence
