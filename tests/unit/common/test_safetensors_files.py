# SPDX-License-Identifier: Apache-2.0
"""Weights that are not whole are told from their headers, before anything loads them."""

import json
import struct

import psutil
import pytest
import torch
from safetensors.torch import save_file

from llm_trainer.common.safetensors_files import (
    check_weights,
    compute_sampled_digest,
    find_unasked_weights,
    list_shapes,
    list_weights,
)

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path):
    """Two shards with a tensor each, `a` and `b`, and their index."""
    for name, shard in zip("ab", SHARDS, strict=True):
        save_file({name: torch.zeros(10, 20)}, tmp_path / shard, metadata={"format": "pt"})
    write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1]})
    return tmp_path


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_whole_weights_are_fine_with_an_index_and_without(folder):
    assert not list(check_weights(folder))
    assert list_shapes(folder) == [[10, 20], [10, 20]]
    (folder / "model.safetensors.index.json").unlink()
    assert not list(check_weights(folder))


def test_only_what_transformers_loads_counts(folder):
    save_file({"tok_embeddings.weight": torch.zeros(10, 20)}, folder / "consolidated.safetensors")
    save_file({"a": torch.zeros(10, 20)}, folder / "model.fp16.safetensors")
    assert list_weights(folder) == [folder / name for name in SHARDS]
    assert list_shapes(folder) == [[10, 20], [10, 20]]
    (folder / "model.safetensors.index.json").unlink()
    assert list_weights(folder) == []


def test_a_single_file_beside_an_index_of_others_is_refused(folder):
    assert not list(find_unasked_weights(folder, "It"))
    save_file({"a": torch.ones(10, 20)}, folder / "model.safetensors")
    assert list_weights(folder) == [folder / "model.safetensors"]  # so does Transformers
    (problem,) = find_unasked_weights(folder, "It")
    assert problem == (
        "It holds model.safetensors, and model.safetensors.index.json names other files: remove one of the two."
    )


def test_an_index_stays_in_its_folder(folder):
    for name in ("../victim.safetensors", "/etc/victim.safetensors"):
        write_index(folder, {"a": name})
        (problem,) = check_weights(folder)
        assert f"names {name!r}, outside of the folder" in problem
        assert list_weights(folder) == []


def test_a_distributed_checkpoint_beside_the_weights_is_refused(folder):
    (folder / "shard-00000-model-00001-of-00001.safetensors").touch()
    (problem,) = find_unasked_weights(folder, "It")
    assert "part of a distributed checkpoint, which would be loaded" in problem


def test_every_shard_that_was_cut_off_is_told_with_its_sizes(folder):
    whole = (folder / SHARDS[0]).stat().st_size
    for shard, size in zip(SHARDS, (whole - 1, 20), strict=True):
        (folder / shard).write_bytes((folder / shard).read_bytes()[:size])
    assert list(check_weights(folder)) == [
        f"{folder / SHARDS[0]} is {whole - 1:,} bytes of {whole:,}: it was cut off; download the model again.",
        f"{folder / SHARDS[1]} ends after 20 bytes, within its header: it was cut off; download the model again.",
    ]
    assert not list_shapes(folder)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "ends after 0 bytes"),
        (b"<!DOCTYPE html><html>", "has no header of the safetensors format"),
        (struct.pack("<Q", 2) + b"[]", "has no header of the safetensors format"),
        (struct.pack("<Q", 9) + b'{"a": {}}', "has no header of the safetensors format"),
        (struct.pack("<Q", 2) + b"{}more", "is 14 bytes of 10: it is damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "is a Git LFS pointer"),
    ],
)
def test_what_is_no_safetensors_file_is_told(folder, content, word):
    (folder / SHARDS[1]).write_bytes(content)
    (problem,) = check_weights(folder)
    assert problem.startswith(f"{folder / SHARDS[1]} {word}")


def test_a_missing_shard_is_told(folder):
    (folder / SHARDS[1]).unlink()
    (problem,) = check_weights(folder)
    assert f"lacks 1 weight files of its index, first {SHARDS[1]}" in problem


def test_a_tensor_that_is_not_where_the_index_says_is_told(folder):
    write_index(folder, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]})
    (problem,) = check_weights(folder)
    assert f"{SHARDS[1]} lacks 1 tensors that model.safetensors.index.json says it holds, first c" in problem


@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": []}}'])
def test_a_broken_index_is_told(folder, index):
    (folder / "model.safetensors.index.json").write_text(index)
    (problem,) = check_weights(folder)
    assert "is not a weights index" in problem or "is not valid JSON" in problem


def test_only_headers_are_read_of_the_many_large_shards_of_a_large_model(tmp_path):
    size = 4 * 2**30
    for number in range(30):
        tensors = {f"{number}.{name}": {"dtype": "U8", "shape": [0], "data_offsets": [0, size]} for name in range(30)}
        header = json.dumps(tensors).encode()
        with (tmp_path / f"{number}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + size)  # a hole: it takes no space
    before = psutil.Process().io_counters().read_chars
    assert not list(check_weights(tmp_path))
    assert psutil.Process().io_counters().read_chars - before < 2**20


def test_a_models_digest_is_its_numbers_and_not_the_spread_of_its_files(folder):
    tensors = {"a": torch.zeros(10, 20), "b": torch.zeros(10, 20)}
    spread = compute_sampled_digest(folder)
    for file in folder.iterdir():
        file.unlink()
    assert compute_sampled_digest(folder) is None
    save_file(tensors, folder / "model.safetensors")
    assert compute_sampled_digest(folder) == spread
    tensors["b"][5, 5] = 1
    save_file(tensors, folder / "model.safetensors")
    assert compute_sampled_digest(folder) != spread


def test_a_large_models_digest_reads_the_middle_of_some_matrices(folder):
    tensors = {f"{number:03}": torch.zeros(40, 200) for number in range(64)}
    save_file(tensors, folder / "model.safetensors")
    first = compute_sampled_digest(folder)
    tensors["001"][20] = 1  # one in two is read
    tensors["002"][0] = 1
    save_file(tensors, folder / "model.safetensors")
    assert compute_sampled_digest(folder) == first
    tensors["002"][20] = 1
    save_file(tensors, folder / "model.safetensors")
    assert compute_sampled_digest(folder) != first
