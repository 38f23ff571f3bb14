# SPDX-License-Identifier: Apache-2.0
"""What becomes of the Hub's answers, given by a real server: a model, a clear refusal, or patience."""

import pytest
from huggingface_hub import constants

from llm_trainer.common import hub
from llm_trainer.common.errors import UserError
from llm_trainer.config.environment import read_environment
from llm_trainer.config.schema import Settings
from llm_trainer.job.inputs import find_inputs
from llm_trainer.launcher.worker_processes import reads_from_hub
from llm_trainer.model import loading
from support.fake_hub import MODEL, FakeHub

TOKEN = "hf_secretOfTheTest"
PERMIT = "give a token that may read it as HF_TOKEN in the job's Environment."
GATED = f"is gated and the given token may not read it: accept its licence on its Hub page, and {PERMIT}"
UNKNOWN = (
    f"is not on the Hugging Face Hub, or is private and the given token may not read it: check the name, and {PERMIT}"
)
REFUSALS = [
    (401, {"X_Error_Code": "GatedRepo"}, GATED),
    (403, {"X_Error_Code": "GatedRepo"}, GATED),
    (401, {"X_Error_Code": "RepoNotFound"}, UNKNOWN),  # so the Hub hides what is private
    (404, {"X_Error_Code": "RepoNotFound"}, UNKNOWN),
    (
        401,
        {"X_Error_Message": "Invalid credentials in Authorization header"},
        f"is refused by the Hugging Face Hub (401) and the given token may not read it: {PERMIT}",
    ),
    (403, {}, f"is refused by the Hugging Face Hub (403) and the given token may not read it: {PERMIT}"),
    (
        404,
        {"X_Error_Code": "RevisionNotFound"},
        "has no such revision on the Hugging Face Hub: check model_revision.",
    ),
]


@pytest.fixture
def fake_hub(tiny_model, tmp_path, monkeypatch):
    """A Hub that huggingface_hub, which read its environment when it was imported, takes for its own."""
    server = FakeHub(tiny_model)
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "FIRST_WAIT_SECONDS", 0.05)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


def refuse(action, *arguments) -> str:
    with pytest.raises(UserError) as information:
        action(*arguments)
    assert TOKEN not in str(information.value)
    return str(information.value)


@pytest.mark.parametrize(("status", "headers", "sentence"), REFUSALS)
def test_a_refusal_is_final_and_has_a_fix(fake_hub, tmp_path, capsys, status, headers, sentence):
    fake_hub.refuse(status, **headers)
    assert refuse(loading.fetch_model, MODEL, Settings().model, tmp_path) == f"model_id='{MODEL}' {sentence}"
    assert len(fake_hub.requests) == 1
    assert fake_hub.tokens == {f"Bearer {TOKEN}"}
    assert "next try" not in capsys.readouterr().out


@pytest.mark.parametrize(("status", "headers", "sentence"), REFUSALS)
def test_a_refusal_without_snapshot_download(fake_hub, status, headers, sentence):
    fake_hub.refuse(status, **headers)
    settings = Settings(use_snapshot_download=False).model
    assert refuse(loading.load_tokenizer, MODEL, settings) == f"model_id='{MODEL}' {sentence}"


def test_a_refusal_without_a_token(fake_hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    fake_hub.refuse(401, X_Error_Code="GatedRepo")
    assert "is gated and no token is given: accept" in refuse(loading.fetch_model, MODEL, Settings().model, tmp_path)


def test_a_name_that_is_none(fake_hub, tmp_path):
    sentence = refuse(loading.fetch_model, "/no/such/folder", Settings().model, tmp_path)
    assert sentence == "model_id='/no/such/folder' is neither a folder nor a Hugging Face Hub id: give one of them."


def test_a_busy_hub_is_asked_again_until_it_delivers(fake_hub, tmp_path, capsys):
    fake_hub.refuse(429, times=2)
    folder = loading.fetch_model(MODEL, Settings().model, tmp_path)
    assert loading.load_tokenizer(folder, Settings().model).eos_token == "<|im_end|>"
    lines = [line for line in capsys.readouterr().out.splitlines() if "next try in" in line]
    assert len(lines) == 2
    assert lines[0].startswith(f"Downloading {MODEL}: 429 Too Many Requests for url: ")


def test_a_hub_that_says_how_long_to_wait(fake_hub, tmp_path, monkeypatch):
    fake_hub.refuse(429, times=1, Retry_After="1")
    waits = []
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    loading.fetch_model(MODEL, Settings().model, tmp_path)
    (wait,) = waits
    assert 1 <= wait <= 1.5


def test_a_hub_that_says_how_long_to_wait_in_its_own_header(fake_hub, tmp_path, monkeypatch):
    fake_hub.refuse(429, times=1, RateLimit='"api";r=0;t=1')
    waits = []
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    loading.fetch_model(MODEL, Settings().model, tmp_path)
    (wait,) = waits
    assert 1 <= wait <= 1.5


@pytest.mark.parametrize("status", [429, 503])
def test_a_hub_that_stays_busy_is_given_up(fake_hub, tmp_path, monkeypatch, status):
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.5)
    fake_hub.refuse(status)
    sentence = refuse(loading.fetch_model, MODEL, Settings().model, tmp_path)
    assert sentence.startswith(f"model_id='{MODEL}' could not be downloaded (")
    assert sentence.endswith("start the job again later, or give the model's files as channel 'model'.")
    assert len(fake_hub.requests) > 2


def test_no_network(fake_hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.5)
    fake_hub.close()
    sentence = refuse(loading.fetch_model, MODEL, Settings().model, tmp_path)
    assert "Connection refused): give the container a network, or give the model's files" in sentence


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, False),
        ({"model_id": MODEL}, True),
        ({"train_dataset_path": "org/rows"}, True),
        ({"val_dataset_path": "org/rows"}, True),
        ({"chat_template_path": "org/other"}, True),
    ],
)
def test_the_hub_is_left_alone_only_by_a_job_that_takes_nothing_from_it(tree, monkeypatch, settings, needs):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    inputs, _ = find_inputs(Settings(**settings), read_environment())
    assert reads_from_hub(inputs, Settings(**settings).model.chat_template_path) is needs
