# SPDX-License-Identifier: Apache-2.0
"""A result is in its place whatever fails beside it, and out of it where it is wrong; it is never lost."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from llm_trainer.common.errors import UserError
from llm_trainer.export import export
from llm_trainer.export.logits_check import ResultDiffersError
from llm_trainer.export.placement import STAGING, list_files
from llm_trainer.serving import lmi_files
from llm_trainer.training.trainer_config import prepare_config
from support.exports import build_manifest, build_result
from support.measures import ROOT
from support.tiny_processors import save_processor
from support.tiny_vision_models import build_vision_model

ESSENTIALS = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"}
WRONG = ResultDiffersError("The adapter does not compute what was trained.")


@pytest.fixture
def trained(tiny_model, tmp_path):
    return build_result(tiny_model, tmp_path)


def fail(error):
    def raise_error(*_, **__):
        raise error

    return raise_error


def export_result(trained):
    export.finish_result(trained, export.place_result(trained), build_manifest())


def read_manifest(folder):
    return json.loads((folder / "training_manifest.json").read_text())


def test_a_result_is_proven_where_it_lies(trained, tmp_path):
    placed = export.place_result(trained)
    assert set(list_files(tmp_path / "model")) >= ESSENTIALS
    assert read_manifest(tmp_path / "model")["export"]["proven"] is False
    export.finish_result(trained, placed, build_manifest())
    manifest = read_manifest(tmp_path / "model")
    assert manifest["export"]["proven"] is True
    assert manifest["export"]["checks"][0]["relative_logit_difference"] <= 1e-4
    assert manifest["files"] == sorted(list_files(tmp_path / "model"))
    assert {"README.md", "adapters/trained/adapter_model.safetensors", "serving.env"} <= set(manifest["files"])


@pytest.mark.parametrize("train_vision", [False, True])
def test_an_adapter_on_the_vision_tower_gets_no_files_for_a_server(tmp_path, train_vision):
    """vLLM would answer without what it learned there."""
    base = tmp_path / "base"
    build_vision_model("qwen", save_processor("qwen", base)).save_pretrained(base)
    trained = build_result(base, tmp_path, train_vision=train_vision)
    export.finish_result(trained, export.place_result(trained), build_manifest())
    assert read_manifest(tmp_path / "model")["export"]["served_by_vllm"] is not train_vision
    assert (tmp_path / "model/serving.env").is_file() is not train_vision
    assert ("it sits on the vision tower" in (tmp_path / "model/README.md").read_text()) is train_vision


@pytest.mark.parametrize("error", [RecursionError(), OSError(errno.ENOSPC, "No space left on device"), KeyError("x")])
def test_whatever_fails_beside_the_result_is_a_warning(trained, tmp_path, monkeypatch, capsys, error):
    for writer in ("write_model_card", "write_serving_files", "write_json"):
        monkeypatch.setattr(export, writer, fail(error))
    export_result(trained)
    assert set(list_files(tmp_path / "model")) >= ESSENTIALS
    assert not any((tmp_path / "model").glob("serving*"))
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Warning: ")]
    for what in ("README.md", "The files for AWS's LMI container", "training_manifest.json"):
        assert any(what in line and "the weights there are whole" in line for line in warnings)


def test_half_a_copy_for_a_server_goes(trained, tmp_path, monkeypatch):
    def copy_half(artefacts, folder):
        (folder / "adapters").mkdir()
        (folder / "adapters/half").touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(lmi_files, "copy_adapter", copy_half)
    export_result(trained)
    assert read_manifest(tmp_path / "model")["export"] | {"checks": []} == {
        "proven": True,
        "reason": None,
        "checks": [],
        "served_by_vllm": False,
        "left_out": [],
    }
    assert not any((tmp_path / "model").glob("*/*"))


@pytest.mark.parametrize("has_room", [True, False])
def test_a_wrong_result_leaves_and_the_earlier_one_comes_back(trained, tmp_path, monkeypatch, has_room):
    (tmp_path / "model/config.json").write_text("earlier")
    (tmp_path / "model/training_manifest.json").write_text('{"files": ["config.json", "training_manifest.json"]}')
    monkeypatch.setattr(export, "prove_trained", fail(WRONG))
    if not has_room:
        monkeypatch.setattr(export, "move_folder", fail(OSError(errno.ENOSPC, "No space left on device")))
    rejected = tmp_path / ("output/data" if has_room else "model") / "rejected_export"
    with pytest.raises(UserError, match=f"trained. What was written is in {rejected}, and the checkpoints are kept."):
        export_result(trained)
    assert set(list_files(rejected)) >= ESSENTIALS | {"training_manifest.json", "README.md"}
    assert read_manifest(rejected)["export"]["proven"] is False
    left = {name for name in list_files(tmp_path / "model") if not name.startswith("rejected_export/")}
    assert left == {"config.json", "training_manifest.json"}
    assert (tmp_path / "model/config.json").read_text() == "earlier"


FAILURES = {
    "there was no room for the comparison (": [
        torch.OutOfMemoryError("CUDA out of memory."),
        OSError(errno.ENOSPC, "No space left"),
    ],
    "the comparison could not be computed (": [
        NotImplementedError("Could not run 'flash_attn::_flash_attn_varlen_forward' with the 'CPU' backend."),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        ImportError("the package flash_attn seems to be not installed"),
        KeyError("weight"),
        UserError("The weights of acme/base could not be loaded (LocalEntryNotFoundError)."),
    ],
}


@pytest.mark.parametrize(("reason", "error"), [(reason, error) for reason in FAILURES for error in FAILURES[reason]])
def test_whatever_ends_a_proof_the_result_stays_and_says_so(trained, tmp_path, monkeypatch, capsys, reason, error):
    monkeypatch.setattr(export, "prove_trained", fail(error))
    export_result(trained)
    assert set(list_files(tmp_path / "model")) >= ESSENTIALS
    outcome = read_manifest(tmp_path / "model")["export"]
    assert (outcome["proven"], outcome["checks"]) == (False, [])
    assert outcome["reason"].startswith(reason)
    assert "Not proven" in (tmp_path / "model/README.md").read_text()
    assert f"Warning: The result is in place, and not proven: {reason}" in capsys.readouterr().out


def test_a_merge_whose_proof_fails_is_there_unproven(tiny_model, tmp_path, monkeypatch):
    trained = build_result(tiny_model, tmp_path, merge_weights=True)
    monkeypatch.setattr(export, "prove_merged", fail(NotImplementedError("no kernel")))
    export_result(trained)
    outcome = read_manifest(tmp_path / "model")["export"]
    assert (tmp_path / "model/model.safetensors").is_file()
    assert outcome["proven"] is False
    assert outcome["reason"] == "the comparison could not be computed (NotImplementedError: no kernel)"
    assert [check["what"] for check in outcome["checks"]] == ["The adapter on its base"]


def test_half_the_weights_are_no_result(trained, tmp_path, monkeypatch):
    def write_half(trained, folder):
        (folder / "adapter_model.safetensors").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "model/kept").touch()
    monkeypatch.setattr(export, "save_weights", write_half)
    with pytest.raises(OSError, match="No space"):
        export.place_result(trained)
    assert list_files(tmp_path / "model") == ["kept"]


def test_weights_that_cannot_get_their_place_stay_where_they_were_written(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export.ModelFolder, "place", fail(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output"):
        export.place_result(trained)
    (file,) = (tmp_path / "model").glob(f"{STAGING}*/new/adapter_model.safetensors")
    assert f"Warning: What was written of the result is in {file.parent}." in capsys.readouterr().out


def save_half_a_tokenizer(tokenizer, base, folder, settings):
    (folder / "vocab.json").write_text("half")
    raise RuntimeError("Cannot send a request, as the client has been closed.")


def test_a_tokenizer_that_cannot_follow_its_base_is_written_plainly(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "save_tokenizer", save_half_a_tokenizer)
    export_result(trained)
    assert set(list_files(tmp_path / "model")) >= ESSENTIALS
    assert not (tmp_path / "model/vocab.json").exists()
    loaded = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert (loaded.get_vocab(), loaded.chat_template) == (
        trained.tokenizer.get_vocab(),
        trained.tokenizer.chat_template,
    )
    assert read_manifest(tmp_path / "model")["export"]["proven"] is True
    assert "Warning: The tokenizer could not be written by the base's files" in capsys.readouterr().out


def test_a_base_that_is_gone_costs_a_full_fine_tune_nothing_but_its_older_words(tiny_model, tmp_path, capsys):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    trained = build_result(base, tmp_path, use_peft=False)
    shutil.rmtree(base)
    export.place_result(replace(trained, plan=replace(trained.plan, folder=str(tmp_path / "base"))))
    assert set(list_files(tmp_path / "model")) >= {"config.json", "model.safetensors", "tokenizer.json"}
    AutoTokenizer.from_pretrained(tmp_path / "model")
    output = capsys.readouterr().out
    for what in ("generation_config.json could not be read again", "A config.json for Transformers 4 too"):
        assert what in output


@pytest.mark.parametrize("merges", [False, True])
def test_without_room_for_the_trained_models_logits_the_result_is_there_unproven(tiny_model, tmp_path, merges):
    trained = build_result(tiny_model, tmp_path, merge_weights=merges)
    export_result(replace(trained, logits=None, unproven="there was no room for the trained model's logits (x)"))
    model_dir = tmp_path / "model"
    weights = {"adapter/adapter_model.safetensors", "model.safetensors"} if merges else {"adapter_model.safetensors"}
    assert set(list_files(model_dir)) >= weights
    outcome = read_manifest(model_dir)["export"]
    assert (outcome["proven"], outcome["checks"]) == (False, [])
    assert outcome["reason"] == "there was no room for the trained model's logits (x)"


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="needs a second disk")
def test_a_folder_that_goes_to_another_disk_arrives_whole(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("x")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as other:
        export.move_folder(source, Path(other) / "target")
        assert (Path(other) / "target/file").read_text() == "x"
    assert not source.exists()


@pytest.mark.long
def test_killed_at_any_moment_it_leaves_no_half_that_looks_whole(tiny_model, tmp_path):
    command = [sys.executable, "-m", "support.killed_exports", tiny_model, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True, check=False, env=environment)
    kinds = [
        re.fullmatch(r"(\w+): kills: (\d+)", line)
        for line in ran.stdout.splitlines()
        if re.search("kills:|killed before", line)
    ]
    assert all(kinds), ran.stdout
    assert [kind[1] for kind in kinds] == ["adapter", "merged", "weights"], ran.stderr
    assert all(int(kind[2]) > 30 for kind in kinds)


@pytest.mark.parametrize("given", [{}, {"use_peft": False}, {"merge_weights": True}])
def test_a_server_ends_an_answer_where_the_template_ends_a_turn(tiny_model, tmp_path, given):
    """The tiny model's template ends turns in <|im_end|> (2), and as a base its EOS is <|endoftext|> (0)."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    generation = {"eos_token_id": 0, "temperature": 0.6, "do_sample": False}
    (base / "generation_config.json").write_text(json.dumps(generation))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(base)
    result = build_result(base, tmp_path, **given)
    prepare_config(result.trainer.model, result.tokenizer)
    export_result(result)
    written = json.loads((tmp_path / "model/generation_config.json").read_text())
    assert {name: written[name] for name in generation} == {**generation, "eos_token_id": [0, 2]}
    served = (tmp_path / "model/serving.env").read_text().splitlines()
    assert ("OPTION_GENERATION_CONFIG=/opt/ml/model" in served) == (not given)
    assert "generation_config.json" in read_manifest(tmp_path / "model")["files"]
