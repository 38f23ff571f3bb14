# SPDX-License-Identifier: Apache-2.0
"""Tensors are read from a model's files by rows, in the order in which they lie there."""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig

from llm_trainer.common.errors import UserError
from llm_trainer.merge import base_tensors
from llm_trainer.merge.base_tensors import CopiedTensor, ReplacedTensor, RoundedTensor, count_rows, list_tensors

MATRIX = torch.arange(12, dtype=torch.bfloat16).reshape(4, 3)


@pytest.fixture
def file(tmp_path):
    """A model's only file, with a matrix, a vector and a single number."""
    tensors = {"matrix": MATRIX, "vector": torch.arange(5.0), "number": torch.tensor(7.0)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_rows_are_read_apart(file):
    tensors = {tensor.name: tensor for tensor in list_tensors([file], torch.float32)}
    matrix, vector, number = (tensors[name] for name in ("matrix", "vector", "number"))
    assert (matrix.dtype, matrix.shape, matrix.file) == (torch.bfloat16, (4, 3), file)
    assert torch.equal(matrix.read(1, 3), MATRIX[1:3])
    assert torch.equal(matrix.read(0, 4), MATRIX)
    assert torch.equal(vector.read(4, 5), torch.tensor([4.0]))
    assert torch.equal(number.read(0, 1), torch.tensor(7.0))
    assert [count_rows(tensor.shape) for tensor in (matrix, vector, number)] == [4, 5, 1]


def test_what_is_read_is_a_copy(file):
    (matrix,) = (tensor for tensor in list_tensors([file], torch.float32) if tensor.name == "matrix")
    matrix.read(0, 4).zero_()
    assert torch.equal(matrix.read(0, 4), MATRIX)


def test_a_file_that_shrinks_during_the_merge_is_told(file):
    tensors = list_tensors([file], torch.float32)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="it was changed during the merge"):
        for tensor in tensors:
            tensor.read(0, count_rows(tensor.shape))


def test_a_type_without_a_counterpart_is_told(tmp_path):
    header = json.dumps({"odd": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(UserError, match="odd is of type F4, which cannot be read here"):
        list_tensors([file], torch.float32)


def test_shards_are_those_of_the_index_or_the_single_file(file):
    assert base_tensors.list_shards(file.parent) == [file]
    file.rename(file.with_name("b.safetensors"))
    save_file({"more": MATRIX}, file.with_name("a.safetensors"))
    index = {"weight_map": {"more": "a.safetensors", **dict.fromkeys(("matrix", "vector", "number"), "b.safetensors")}}
    file.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    assert [shard.name for shard in base_tensors.list_shards(file.parent)] == ["a.safetensors", "b.safetensors"]


def test_a_folder_without_weights_is_told(tmp_path):
    with pytest.raises(UserError):
        base_tensors.list_shards(tmp_path)


def test_replaced_and_copied_tensors_stand_in_the_place_of_another(file):
    (matrix,) = (tensor for tensor in list_tensors([file], torch.float32) if tensor.name == "matrix")
    replaced = ReplacedTensor(matrix, values=MATRIX + 1)
    assert (replaced.name, replaced.shape, replaced.dtype) == ("matrix", (4, 3), torch.bfloat16)
    assert torch.equal(replaced.read(2, 4), MATRIX[2:4] + 1)
    copied = CopiedTensor(matrix, "tied")
    assert copied.name == "tied"
    assert torch.equal(copied.read(0, 2), MATRIX[:2])


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_rounded_tensor_is_what_8_bit_loading_makes_of_it(tmp_path, is_transposed):
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    (stored,) = list_tensors([tmp_path / "model.safetensors"], torch.float32)
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    rounded = RoundedTensor(stored, quantization, torch.float32, is_transposed).read(0, 32).float()
    scales = weight.abs().amax(dim=0 if is_transposed else 1, keepdim=True) / 127
    assert rounded.shape == weight.shape
    assert not torch.equal(rounded, weight)
    assert ((rounded - weight).abs() <= 0.51 * scales + 2e-3).all()
