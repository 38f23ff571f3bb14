# SPDX-License-Identifier: Apache-2.0
"""Merged shards are safetensors files of the right numbers, written by blocks, and never half under their names."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llm_trainer.common.errors import UserError
from llm_trainer.merge import shard_writer
from llm_trainer.merge.base_tensors import list_tensors
from llm_trainer.merge.lora_deltas import LowRankDelta
from llm_trainer.merge.shard_writer import UNFINISHED, MergedShard, MergedTensor, claim_output

LEFT, RIGHT = torch.randn(6, 2), torch.randn(2, 4)


@pytest.fixture
def shards(tmp_path) -> list[MergedShard]:
    """Two shards: a changed matrix in bfloat16 with a vector in float32, and a single number."""
    tensors = {"matrix": torch.randn(6, 4).bfloat16(), "vector": torch.randn(3), "number": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = {tensor.name: tensor for tensor in list_tensors([tmp_path / "model.safetensors"], torch.float32)}
    merged = {
        name: MergedTensor(name, tensor.dtype, tensor, LowRankDelta(LEFT, RIGHT, 0.5) if name == "matrix" else None)
        for name, tensor in stored.items()
    }
    groups = {"model-00001-of-00002.safetensors": ("matrix", "vector"), "model-00002-of-00002.safetensors": ("number",)}
    return [MergedShard(file, [merged[name] for name in names]) for file, names in groups.items()]


def write(output: Path, shards: list[MergedShard]) -> None:
    claim_output(output, {"base": "a"})
    shard_writer.write_shards(output, shards)


@pytest.mark.parametrize("block_numbers", [2**20, 8, 1])
def test_shards_hold_the_sums_in_their_own_type_whatever_the_blocks(tmp_path, shards, monkeypatch, block_numbers):
    monkeypatch.setattr(shard_writer, "BLOCK_NUMBERS", block_numbers)
    output, base = tmp_path / "out", load_file(tmp_path / "model.safetensors")
    write(output, shards)
    assert [file.name for file in output.iterdir()] == [UNFINISHED]
    shard_writer.publish_shards(output, shards)
    shard_writer.remove_record(output)
    assert sorted(file.name for file in output.iterdir()) == [shard.file_name for shard in shards]
    first, second = (load_file(output / shard.file_name) for shard in shards)
    expected = torch.addmm(base["matrix"].float(), LEFT, RIGHT, alpha=0.5).bfloat16()
    torch.testing.assert_close(first["matrix"], expected)
    assert torch.equal(first["vector"], base["vector"])
    assert torch.equal(second["number"], base["number"])
    for shard in shards:
        assert (output / shard.file_name).stat().st_size == shard.num_bytes
        with safe_open(output / shard.file_name, "pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_wider_numbers_come_first_so_that_all_are_aligned(shards):
    assert [(tensor.name, offset) for tensor, offset in shards[0].list_places()] == [("vector", 0), ("matrix", 12)]


def test_what_an_earlier_process_finished_is_not_written_again(tmp_path, shards, capsys):
    output = tmp_path / "out"
    claim_output(output, {"base": "a"})
    (output / UNFINISHED / shards[0].file_name).write_text("finished before")
    assert shard_writer.find_finished(output, shards) == [shards[0].file_name]
    shard_writer.write_shards(output, shards)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Merge: 1 of 2 shards were merged before"
    assert lines[1].startswith("Merge: shard 2 of 2, ")
    assert (output / UNFINISHED / shards[0].file_name).read_text() == "finished before"


def test_an_output_folder_belongs_to_one_merge(tmp_path):
    output = tmp_path / "out"
    claim_output(output, {"base": "a", "shapes": (1, 2)})
    claim_output(output, {"base": "a", "shapes": [1, 2]})
    with pytest.raises(UserError, match="an unfinished merge of another base or adapter"):
        claim_output(output, {"base": "b", "shapes": [1, 2]})
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").touch()
    with pytest.raises(UserError, match=r"is not empty \(mine\.txt\)"):
        claim_output(other, {})
    (other / "mine.txt").unlink()
    (other / UNFINISHED).symlink_to(output / UNFINISHED)  # what it names would be overwritten, and removed at the end
    with pytest.raises(UserError, match="is not empty"):
        claim_output(other, {"base": "a", "shapes": [1, 2]})
    assert json.loads((output / UNFINISHED / shard_writer.RECORD).read_text()) == {"base": "a", "shapes": [1, 2]}
