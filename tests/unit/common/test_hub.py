# SPDX-License-Identifier: Apache-2.0
"""What becomes of the Hub's answers, given by a real server: a model, a clear refusal, or patience."""

import errno
import json
import shutil
import socket
from pathlib import Path

import pytest
from huggingface_hub import constants
from safetensors.torch import load

from llm_trainer.common import hub
from llm_trainer.common.errors import UserError
from llm_trainer.common.safetensors_files import list_weights
from llm_trainer.config.environment import read_environment
from llm_trainer.config.schema import Settings
from llm_trainer.job.earlier_adapter import fetch_adapter
from llm_trainer.job.inputs import find_inputs
from llm_trainer.launcher.worker_processes import reads_from_hub
from llm_trainer.model import loading
from support.fake_hub import MODEL

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
def fake_hub(fake_hub, monkeypatch):
    """The Hub, asked with a token, and soon again."""
    monkeypatch.setattr(hub, "FIRST_WAIT_SECONDS", 0.05)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return fake_hub


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
    assert refuse(loading.load_tokenizer, MODEL, settings, 259) == f"model_id='{MODEL}' {sentence}"


def test_a_refusal_without_a_token(fake_hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    fake_hub.refuse(401, X_Error_Code="GatedRepo")
    assert "is gated and no token is given: accept" in refuse(loading.fetch_model, MODEL, Settings().model, tmp_path)


def test_a_name_that_is_none(fake_hub, tmp_path):
    sentence = refuse(loading.fetch_model, "/no/such/folder", Settings().model, tmp_path)
    assert sentence == "model_id='/no/such/folder' is neither a folder nor a Hugging Face Hub id: give one of them."


def list_downloads(server) -> list[str]:
    return sorted(
        request.partition("/resolve/")[2].partition("/")[2]
        for request in server.requests
        if request.startswith("GET") and "/resolve/" in request
    )


OTHER_FORMATS = (
    "consolidated.safetensors",
    "original/model.safetensors",
    "original/consolidated.00.pth",
    "model.fp16.safetensors",
    "onnx/model.onnx",
    "openvino/openvino_model.bin",
    "pytorch_model.bin",
    "tf_model.h5",
    "flax_model.msgpack",
    "model-Q4_K_M.gguf",
)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_the_weights_are_downloaded_once(fake_hub, tmp_path, is_sharded):
    fake_hub.files |= dict.fromkeys(OTHER_FORMATS, b"the same weights once more")
    names = ["model.safetensors"]
    if is_sharded:
        weights = fake_hub.files.pop("model.safetensors")
        names = ["model-00001-of-00001.safetensors"]
        fake_hub.files[names[0]] = weights
        tensors = dict.fromkeys(load(weights), names[0])
        fake_hub.files["model.safetensors.index.json"] = json.dumps({"weight_map": tensors}).encode()
    folder = Path(loading.fetch_model(MODEL, Settings().model, tmp_path))
    assert [name for name in list_downloads(fake_hub) if not name.endswith((".json", ".jinja"))] == names
    assert list_weights(folder) == [folder / name for name in names]


def test_a_model_in_the_cache_is_found_without_the_hub(fake_hub, tmp_path):
    assert hub.find_downloaded(MODEL, None) is None
    folder = Path(hub.download_model(MODEL, None, with_weights=False))
    assert hub.find_downloaded(MODEL, None) is None  # the weights are missing
    hub.download_model(MODEL, None, with_weights=True)
    asked = len(fake_hub.requests)
    assert hub.find_downloaded(MODEL, None) == folder
    assert len(fake_hub.requests) == asked


def test_weights_that_are_not_read_are_not_downloaded(fake_hub, tmp_path):
    fake_hub.files["pytorch_model.bin"] = fake_hub.files.pop("model.safetensors")
    assert "has no model.safetensors and no index" in refuse(loading.fetch_model, MODEL, Settings().model, tmp_path)
    assert "pytorch_model.bin" not in list_downloads(fake_hub)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("has_base", [True, False])
def test_an_adapter_in_the_repository_is_refused_before_the_weights(fake_hub, tmp_path, has_base, at_once):
    fake_hub.files["adapter_config.json"] = b'{"base_model_name_or_path": "org/base"}'
    if not has_base:
        del fake_hub.files["config.json"]
    settings = Settings(use_snapshot_download=at_once).model
    sentence = refuse(loading.fetch_model, MODEL, settings, tmp_path)
    told = "also holds an adapter" if has_base else "holds an adapter of 'org/base' and no model"
    assert f"model_id='{MODEL}' {told}" in sentence
    assert not any(name.endswith(".safetensors") for name in list_downloads(fake_hub))


def test_a_busy_hub_is_asked_again_until_it_delivers(fake_hub, tmp_path, capsys):
    fake_hub.refuse(429, times=2)
    folder = loading.fetch_model(MODEL, Settings().model, tmp_path)
    assert loading.load_tokenizer(folder, Settings().model, 259).eos_token == "<|im_end|>"
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
    "fault",
    [
        socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"),
        OSError(errno.ENETUNREACH, "Network is unreachable"),
    ],
)
def test_a_job_waits_for_a_network_and_a_person_does_not(fake_hub, tmp_path, monkeypatch, fault):
    def fail(*arguments, **options):
        raise fault

    waits: list[float] = []
    monkeypatch.setattr(hub, "PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr(hub.time, "sleep", waits.append)
    monkeypatch.setattr(socket, "create_connection", fail)
    with hub.expect_network():
        told = refuse(loading.fetch_model, MODEL, Settings().model, tmp_path)
    assert waits == []
    assert f"{fault.strerror}): give the container a network, or give the model's files" in told
    assert refuse(loading.fetch_model, MODEL, Settings().model, tmp_path) == told
    assert waits


def test_a_person_waits_for_a_busy_hub(fake_hub, tmp_path, capsys):
    fake_hub.refuse(503, times=2)
    with hub.expect_network():
        assert Path(loading.fetch_model(MODEL, Settings().model, tmp_path)).is_dir()
    assert capsys.readouterr().out.count("next try in") == 2


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, False),
        ({"model_id": MODEL}, True),
        ({"train_dataset_path": "org/rows"}, True),
        ({"val_dataset_path": "org/rows"}, True),
        ({"chat_template_path": "org/other"}, True),
        ({"adapter_path": "org/adapter"}, True),
    ],
)
def test_the_hub_is_left_alone_only_by_a_job_that_takes_nothing_from_it(tree, monkeypatch, settings, needs):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    inputs, _ = find_inputs(Settings(**settings), read_environment())
    assert reads_from_hub(inputs, Settings(**settings).model.chat_template_path) is needs


def test_an_adapter_is_downloaded_by_its_own_settings(fake_hub, tmp_path):
    fake_hub.files |= {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights", "adapter_model.bin": b""}
    folder = Path(fetch_adapter(MODEL, None, tmp_path))
    assert sorted(file.name for file in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert fetch_adapter(str(folder), None, tmp_path) == str(folder)
    fake_hub.refuse(404, X_Error_Code="RevisionNotFound")
    (tmp_path / "adapter.done").unlink()
    sentence = refuse(fetch_adapter, MODEL, "v9", tmp_path)
    assert sentence == (f"adapter_path='{MODEL}' has no such revision on the Hugging Face Hub: check adapter_revision.")


def test_weights_without_room_are_refused_before_their_first_byte(fake_hub, tmp_path):
    fake_hub.files |= dict.fromkeys(OTHER_FORMATS, b"the same weights once more")
    fake_hub.told_sizes = dict.fromkeys(OTHER_FORMATS, 10**18)
    folder = Path(loading.fetch_model(MODEL, Settings().model, tmp_path))  # the others are not downloaded
    shutil.rmtree(constants.HF_HUB_CACHE)
    (tmp_path / "model.done").unlink()
    fake_hub.told_sizes = {"model.safetensors": 2**60}
    fake_hub.requests.clear()
    for at_once in (True, False):
        sentence = refuse(loading.fetch_model, MODEL, Settings(use_snapshot_download=at_once).model, tmp_path)
        told = f"model_id='{MODEL}' has 1073741824 GiB of weights to download, and "
        assert sentence.startswith(told)
        assert f" GiB are free in {constants.HF_HUB_CACHE}: raise VolumeSizeInGB on SageMaker" in sentence
    assert "model.safetensors" not in list_downloads(fake_hub)
    asked = [request for request in fake_hub.requests if request.endswith("model.safetensors")]
    assert [request.split()[0] for request in asked] == ["HEAD", "HEAD"]  # one for each try
    assert not (folder / "model.safetensors").exists()


def test_a_cache_of_the_ranks_own_is_not_judged(fake_hub, tmp_path):
    fake_hub.told_sizes = {"model.safetensors": 2**60}
    settings = Settings(use_snapshot_download=False, model_init_kwargs={"cache_dir": "/elsewhere"})
    assert loading.fetch_model(MODEL, settings.model, tmp_path) == MODEL


def test_a_hub_out_of_reach_says_nothing_of_sizes(fake_hub, tmp_path, monkeypatch):
    """As with a cache that an older huggingface_hub filled, which kept no list of the repository's files."""
    folder = Path(loading.fetch_model(MODEL, Settings().model, tmp_path))
    weights = hub.measure_weights(MODEL, folder)
    assert (weights.whole_bytes, weights.missing_bytes) == ((folder / "model.safetensors").stat().st_size, 0)
    older = tmp_path / "older"
    shutil.copytree(constants.HF_HUB_CACHE, older, symlinks=True, ignore=shutil.ignore_patterns("trees"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(older))
    fake_hub.refuse(503)
    assert hub.measure_weights(MODEL, folder) is None
    hub.check_room(MODEL, folder)


@pytest.mark.parametrize(("status", "headers", "sentence"), REFUSALS[:2])
def test_weights_that_alone_are_gated(fake_hub, tmp_path, status, headers, sentence):
    fake_hub.refused = "model.safetensors"
    fake_hub.refuse(status, **headers)
    assert refuse(loading.fetch_model, MODEL, Settings().model, tmp_path) == f"model_id='{MODEL}' {sentence}"


@pytest.mark.parametrize(("status", "headers", "sentence"), REFUSALS[:1])
def test_a_gated_model_bars_this_machine_and_not_a_job_with_a_token(fake_hub, status, headers, sentence):
    fake_hub.refuse(status, **headers)
    assert hub.find_barrier(MODEL, others_may_read=False) is None  # `validate` tells it
    assert "gated" in hub.find_barrier(MODEL, others_may_read=True)
    assert hub.needs_token(MODEL)


def test_a_hub_that_is_busy_or_out_of_reach_bars_this_machine(fake_hub, monkeypatch):
    fake_hub.refuse(503)
    assert "the Hub is busy" in hub.find_barrier(MODEL, others_may_read=False)
    assert not hub.needs_token(MODEL)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not hub.needs_token(MODEL)
    assert "the Hub cannot be reached" in hub.find_barrier(MODEL, others_may_read=False)
