# SPDX-License-Identifier: Apache-2.0
"""Hosts and jobs that share a disk share the tokens on it."""

import ast
import json
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Barrier

import pytest
import torch.multiprocessing
from datasets import Dataset

import llm_trainer
from llm_trainer.config.schema import FIELDS, Settings
from llm_trainer.data.encoding import Vocabulary
from llm_trainer.data.token_cache import (
    CODE_THAT_DECIDES_TOKENS,
    ROWS,
    SETTINGS_THAT_DECIDE_TOKENS,
    build_key,
    prepare_source,
)
from llm_trainer.readers import images
from llm_trainer.readers.sources import FileSource
from support.image_rows import build_vocabulary, encode
from support.tiny_model import build_tokenizer
from support.tiny_processors import draw
from support.waiting import GUARD_SECONDS

NUM_ROWS = 2000


def prepare_at_once(rank, folder, barrier: Barrier):
    """Prepare the folder's rows.jsonl. Nobody reads a row before all have begun, nor ends before all have read."""

    class SlowSource(FileSource):
        def read_parts(self, max_rows):
            barrier.wait()
            yield from super().read_parts(max_rows)
            barrier.wait()

    tokenizer = build_tokenizer()
    vocabulary = Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    source = SlowSource("train", folder, (folder / "rows.jsonl",))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LLM_TRAINER_CACHE", str(folder / "cache"))
        prepared, report = prepare_source(source, vocabulary, Settings(dataset_num_proc=1).data)
    assert report.num_rows == NUM_ROWS
    assert Dataset.from_file(str(prepared / ROWS))["length"][:] == [number % 50 + 2 for number in range(NUM_ROWS)]


def test_two_processes_prepare_the_same_data_at_once_and_one_folder_is_left(tmp_path):
    rows = [{"text": "x" * (number % 50 + 1)} for number in range(NUM_ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    barrier = torch.multiprocessing.get_context("fork").Barrier(2, timeout=GUARD_SECONDS)
    # Forked, since a fresh process would import torch and Transformers for seconds.
    torch.multiprocessing.start_processes(prepare_at_once, (tmp_path, barrier), nprocs=2, start_method="fork")
    assert len(list((tmp_path / "cache/data").iterdir())) == 1


def find_imports(file):
    """The modules of `readers` and `data` that a file of the package imports, as paths in the package."""
    tree = ast.parse((Path(llm_trainer.__file__).parent / file).read_text(encoding="utf-8"))
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    names = {node.module for node in froms} | {f"{node.module}.{each.name}" for node in froms for each in node.names}
    names |= {each.name for node in ast.walk(tree) if isinstance(node, ast.Import) for each in node.names}
    paths = {name.removeprefix("llm_trainer.").replace(".", "/") + ".py" for name in names}
    places = {path for path in paths if path.startswith(("readers/", "data/"))}
    return {path for path in places if (Path(llm_trainer.__file__).parent / path).is_file()}


def test_the_key_holds_all_code_that_decides_tokens():
    todo, found = ["data/tokenize.py", "data/encoding.py", "data/token_cache.py"], set()
    while todo:
        file = todo.pop()
        if file not in found:
            found.add(file)
            todo += find_imports(file)
    assert found == set(CODE_THAT_DECIDES_TOKENS)
    assert len(CODE_THAT_DECIDES_TOKENS) == len(found)


OTHER_VALUES = {
    "method": "dpo",
    "dataset_format": "text",
    "text_field": "body",
    "messages_field": "chat",
    "max_length": 7,
    "apply_truncation": False,
    "truncation_mode": "keep_end",
    "assistant_only_loss": True,
    "completion_only_loss": True,
    "escape_control_tokens": True,
    "max_image_pixels": 9,
    "max_images_per_row": 9,
    "allow_remote_images": True,
}


def test_the_key_differs_with_each_setting_that_decides_tokens_and_with_no_other():
    assert OTHER_VALUES.keys() == set(SETTINGS_THAT_DECIDE_TOKENS) <= FIELDS.keys()
    tokenizer = build_tokenizer()
    vocabulary = Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))

    def key(files=(), **values):
        return build_key(list(files), vocabulary, Settings(**values).data)

    others = {key(**{name: value}) for name, value in OTHER_VALUES.items()}
    assert len(others | {key()}) == len(OTHER_VALUES) + 1
    assert key(packing=True, dataset_num_proc=3, shuffle_dataset=True) == key()
    assert key([{"name": "a.jsonl"}]) != key()


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Prepares two rows, and returns their folder and its texts."""
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    tokenizer = build_tokenizer()
    vocabulary = Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))

    def prepare(words):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(f'{{"text": "{word}"}}\n' for word in words))
        source = FileSource("train", tmp_path, (file,))
        folder, report = prepare_source(source, vocabulary, Settings(dataset_num_proc=1).data)
        rows = Dataset.from_file(str(folder / ROWS), in_memory=True)["input_ids"][:]
        assert report.num_rows == len(rows)
        return folder, [tokenizer.decode(row[:-1]) for row in rows]

    return prepare


def cut(folder):
    content = (folder / ROWS).read_bytes()
    (folder / ROWS).write_bytes(content[: len(content) // 2])


def flip(folder):
    content = bytearray((folder / ROWS).read_bytes())
    content[content.index(b"\x00\x00\x01\x00\x00\x00") + 2] ^= 3
    (folder / ROWS).write_bytes(content)


def open_up(folder):
    folder.chmod(0o777)


@pytest.mark.parametrize("harm", [cut, flip, open_up, lambda folder: (folder / "report.json").unlink()])
def test_tokens_that_are_not_as_they_were_written_are_made_anew(prepare, capsys, harm):
    folder, texts = prepare(["one", "two"])
    assert texts == ["one", "two"]
    harm(folder)
    assert prepare(["one", "two"]) == (folder, texts)
    assert f"The tokens kept in {folder} are made anew: the folder " in capsys.readouterr().out
    assert prepare(["one", "two"]) == (folder, texts)
    assert "made anew" not in capsys.readouterr().out


def test_tokens_of_other_data_are_not_taken(prepare, capsys):
    folder, _ = prepare(["one", "two"])
    other, _ = prepare(["three", "four"])
    shutil.rmtree(folder)
    shutil.copytree(other, folder)
    assert prepare(["one", "two"]) == (folder, ["one", "two"])
    assert "the folder belongs to other data" in capsys.readouterr().out


def test_tokens_of_rows_with_images_are_used_again_as_long_as_their_images_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    channel = tmp_path / "train"
    channel.mkdir()
    vocabulary = build_vocabulary("qwen", channel)
    draw(100, 60).save(channel / "a.png")
    messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "A cat."}]
    (channel / "rows.jsonl").write_text(json.dumps({"messages": messages, "images": ["a.png"]}))

    def prepare():
        files = (channel / "rows.jsonl",)
        source = FileSource("train", channel, files, passed_over={channel / "a.png": "of no kind that is read"})
        folder, report = prepare_source(source, vocabulary, Settings(dataset_num_proc=1).data)
        assert report.num_images == 1
        return folder, Dataset.from_file(str(folder / ROWS), in_memory=True)["pictures"][0][0]

    first, placed = prepare()
    assert placed["path"] == str(channel / "a.png")
    assert prepare()[0] == first
    draw(28, 28).save(channel / "a.png")
    other, smaller = prepare()
    assert other != first and smaller["tokens"] < placed["tokens"]


@pytest.mark.parametrize(
    ("is_sharded", "allow_remote_images", "sees", "expected"),
    [(False, False, True, 500), (True, False, False, 500), (True, False, True, 16), (False, True, True, 16)],
)
def test_rows_that_get_the_bytes_of_images_are_few_at_a_time(
    tmp_path, monkeypatch, is_sharded, allow_remote_images, sees, expected
):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    asked = []

    class Recorder(FileSource):
        def read_parts(self, max_rows):
            asked.append(max_rows)
            return super().read_parts(max_rows)

    vocabulary = build_vocabulary("qwen", tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    source = Recorder("train", tmp_path, (tmp_path / "rows.jsonl",), is_sharded=is_sharded)
    settings = Settings(dataset_num_proc=1, allow_remote_images=allow_remote_images).data
    prepare_source(source, vocabulary if sees else replace(vocabulary, images=None), settings)
    assert asked == [expected]


def test_what_signs_the_address_of_an_image_is_in_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(images, "fetch", lambda address, _: encode(draw(30, 30)) if "good" in address else b"")
    messages = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "A cat."}]
    addresses = [
        f"https://me:5ec2e7@host/{name}.png?X-Amz-Signature=5ec2e7&x=5ec2e7#5ec2e7" for name in ("good", "bad")
    ]
    rows = [{"messages": messages, "images": [address]} for address in addresses]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FileSource("train", tmp_path, (tmp_path / "rows.jsonl",))
    settings = Settings(dataset_num_proc=1, allow_remote_images=True).data
    folder, report = prepare_source(source, build_vocabulary("qwen", tmp_path), settings)
    assert (report.num_images, report.num_bad_rows) == (1, 1)
    written = b"".join(file.read_bytes() for file in folder.iterdir())
    assert b"5ec2e7" not in written and b"https://host/good.png" in written and b"https://host/bad.png" in written
