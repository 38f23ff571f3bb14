# SPDX-License-Identifier: Apache-2.0
"""Files of a result come and go in an order in which half of one never looks like a whole one."""

import json

import pytest

from llm_trainer.export.placement import ModelFolder, list_files, order_files
from llm_trainer.journal.manifest import MANIFEST, list_whole_result

ADAPTER = ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]
LMI_COPY = "adapters/trained/adapter_config.json"


def write(folder, names, text):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def write_result(folder, names, text="earlier"):
    write(folder, names, text)
    (folder / MANIFEST).write_text(json.dumps({"files": [MANIFEST, *names]}))


def place(model_dir, names=ADAPTER, others=()):
    folder = ModelFolder.open(model_dir)
    write(folder.new, [MANIFEST, *names], "new")
    folder.place([MANIFEST, *names, *others], list_whole_result(model_dir))
    return folder


def test_the_manifest_comes_first_then_the_weights_the_config_and_a_servers_settings():
    names = [
        "serving.properties",
        "config.json",
        "adapter/adapter_config.json",
        "model.safetensors",
        "adapter/a",
        MANIFEST,
    ]
    assert order_files(names) == [
        *(MANIFEST, "adapter/a", "model.safetensors", "adapter/adapter_config.json", "config.json"),
        "serving.properties",
    ]


def test_an_earlier_result_goes_and_what_is_not_its_own_stays(tmp_path):
    write_result(tmp_path, ["config.json", "model.safetensors", LMI_COPY, "tokenizer.json"])
    write_result(tmp_path / "adapter", ADAPTER)
    write(tmp_path, ["notes.txt", "adapters/other/adapter_config.json"], "of the user")
    place(tmp_path).close()
    assert sorted(list_files(tmp_path)) == sorted(
        [MANIFEST, *ADAPTER, "notes.txt", "adapters/other/adapter_config.json"]
    )
    assert {(tmp_path / name).read_text() for name in ADAPTER} == {"new"}
    assert not (tmp_path / "adapter").exists()


def test_a_result_that_fails_its_proof_goes_and_the_earlier_one_comes_back(tmp_path):
    write_result(tmp_path, ["config.json", "model.safetensors", "tokenizer.json"])
    before = {name: (tmp_path / name).read_text() for name in list_files(tmp_path)}
    folder = place(tmp_path)
    removed = folder.take_back([MANIFEST, *ADAPTER, "never_written"])
    assert sorted(list_files(removed)) == sorted([MANIFEST, *ADAPTER])
    folder.close()
    assert {name: (tmp_path / name).read_text() for name in list_files(tmp_path)} == before


@pytest.mark.parametrize(
    "victim", ["../victim", "/absolute", "adapters/trained", "link/victim", "sub/victim", "", ".", 7]
)
def test_a_manifest_names_nothing_that_no_job_wrote(tmp_path, victim):
    model_dir, outside = tmp_path / "model", tmp_path / "victim"
    write(tmp_path, ["victim/victim", "model/adapters/trained/kept", "model/sub/victim"], "of others")
    (model_dir / "link").symlink_to(outside)
    name = str(outside) if victim == "/absolute" else victim
    (model_dir / MANIFEST).write_text(json.dumps({"files": [name]}))
    place(model_dir).close()
    kept = ["victim/victim", "model/adapters/trained/kept", "model/sub/victim"]
    assert [(tmp_path / name).read_text() for name in kept] == ["of others"] * 3
    assert (model_dir / "link").is_symlink()


@pytest.mark.parametrize(
    "content", ["", "[]", '{"files": {"a": 1}}', "[" * 100_000, '{"files": ["a\\u0000", "\\ud800"]}']
)
def test_a_manifest_that_nobody_can_read_is_replaced(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    place(tmp_path).close()
    assert (tmp_path / MANIFEST).read_text() == "new"


def test_nothing_is_written_or_removed_through_a_link(tmp_path):
    model_dir, outside = tmp_path / "model", tmp_path / "outside"
    write_result(outside, ADAPTER)
    (outside / "trained").mkdir()
    model_dir.mkdir()
    for name in ("adapter", "adapters", "tokenizer.json", ".llm-trainer-export"):
        (model_dir / name).symlink_to(outside)
    (model_dir / MANIFEST).symlink_to(outside / MANIFEST)
    before = {name: (outside / name).read_text() for name in list_files(outside)}
    folder = place(model_dir, [*ADAPTER, "adapter/adapter_config.json"], [LMI_COPY])
    write(folder.new, [LMI_COPY], "new")
    folder.add_files()
    folder.close()
    assert {name: (outside / name).read_text() for name in list_files(outside)} == before
    assert sorted(list_files(model_dir)) == sorted([MANIFEST, *ADAPTER, "adapter/adapter_config.json", LMI_COPY])
    assert not any(path.is_symlink() for path in model_dir.rglob("*"))


def test_a_link_to_the_model_folder_itself_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "disk")
    place(tmp_path / "model").close()
    assert sorted(list_files(tmp_path / "disk")) == sorted([MANIFEST, *ADAPTER])


def test_what_came_into_the_way_during_the_training_is_kept(tmp_path, capsys):
    write(tmp_path, ["tokenizer.json/mine", "adapter_config.json"], "of the user")
    place(tmp_path).close()
    (kept,) = tmp_path.glob("not-of-the-result-*")
    assert sorted(list_files(kept)) == ["adapter_config.json", "tokenizer.json/mine"]
    assert {(kept / name).read_text() for name in list_files(kept)} == {"of the user"}
    assert f"adapter_config.json, tokenizer.json would be in the way of the result: moved to {kept}." in (
        capsys.readouterr().out
    )
