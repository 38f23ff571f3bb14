# SPDX-License-Identifier: Apache-2.0
"""The check loads a result where there is room, with the kernel of that place; only wrong files speak against it."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_trainer.common.errors import UserError
from llm_trainer.export import logits_check, verify
from llm_trainer.export.logits_check import ResultDiffersError, compute_logits
from llm_trainer.export.verify import prove_merged, prove_trained
from llm_trainer.model.attention import AttentionChoice
from llm_trainer.model.device import Device
from llm_trainer.model.layers.float8 import convert_base
from llm_trainer.model.loading import build_skeleton
from llm_trainer.model.lora import list_trained_layers
from support.exports import build_result

A10G = Device(torch.device("cuda", 0), "NVIDIA A10G", (8, 6))
LARGE = 1 << 40  # bytes that a host has free


def train_on_gpu(base, tree, monkeypatch, **given):
    """A result that was trained with flash attention on a GPU that has no room for the check, its files in `written`.

    Nothing of flash attention is installed: whoever loads it here fails as its missing CPU code would.
    """
    result = build_result(base, tree, **given)
    written = tree / "written"
    result.trainer.model.save_pretrained(written)
    monkeypatch.setattr(logits_check, "find_free_memory", lambda device: 0 if device.is_gpu else LARGE)
    plan = replace(result.plan, device=A10G, attention=AttentionChoice("flash_attention_2", "auto"))
    return replace(result, plan=plan), written


@pytest.mark.parametrize("use_peft", [True, False])
def test_on_the_cpu_the_check_has_a_kernel_of_the_cpu(tiny_model, tmp_path, monkeypatch, use_peft):
    result, written = train_on_gpu(tiny_model, tmp_path, monkeypatch, use_peft=use_peft)
    (check,) = prove_trained(result, written, result.logits, trained_bytes=1)
    assert check["loaded"] == "whole on the CPU"
    assert check["relative_logit_difference"] <= check["tolerance"]


def test_so_has_the_check_of_a_merge(tiny_model, tmp_path, monkeypatch):
    result, written = train_on_gpu(tiny_model, tmp_path, monkeypatch, use_peft=False)
    (check,) = prove_merged(result, tmp_path, written)
    assert check["loaded"] == "whole on the CPU"


def test_where_it_was_trained_the_check_has_the_kernel_of_the_training(tiny_model, tmp_path, monkeypatch):
    result, _ = train_on_gpu(tiny_model, tmp_path, monkeypatch)
    place = logits_check.CheckPlace(A10G.torch, "layer by layer on the GPU")
    assert verify.choose_kernel(result, place) == "flash_attention_2"


def test_files_that_are_not_whole_differ(tiny_model, tmp_path):
    result = build_result(tiny_model, tmp_path, use_peft=False)
    result.trainer.model.save_pretrained(tmp_path / "written")
    file = tmp_path / "written/model.safetensors"
    tensors = load_file(file)
    removed = tensors.pop("model.norm.weight")
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ResultDiffersError, match=r"lack 1 tensors of the model, first model\.norm\.weight"):
        list(prove_trained(result, file.parent, result.logits, trained_bytes=1))
    save_file({**tensors, "model.norm.weight": removed[:1].clone()}, file, {"format": "pt"})
    with pytest.raises(ResultDiffersError, match="do not fit its config"):
        list(prove_trained(result, file.parent, result.logits, trained_bytes=1))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ResultDiffersError, match=r"^model\.safetensors was not written whole \("):
        list(prove_trained(result, file.parent, result.logits, trained_bytes=1))


def test_a_base_that_is_gone_is_no_difference(tiny_model, tmp_path):
    result = build_result(tiny_model, tmp_path)
    result.trainer.model.save_pretrained(tmp_path / "written")
    gone = replace(result, plan=replace(result.plan, folder=str(tmp_path / "gone")))
    with pytest.raises(UserError, match="gone") as caught:
        list(prove_trained(gone, tmp_path / "written", result.logits, trained_bytes=1))
    assert not isinstance(caught.value, ResultDiffersError)


def test_a_base_in_float8_is_proven_in_float8_and_its_distance_from_the_original_is_told(tiny_model, tmp_path):
    result = build_result(tiny_model, tmp_path)
    written = tmp_path / "written"
    result.trainer.model.save_pretrained(written)
    names = tuple(list_trained_layers(build_skeleton(result.plan.folder, result.plan.config, False)))
    assert convert_base(result.trainer.model, names).startswith(f"float8: {len(names)} of ")
    logits = compute_logits(result.trainer.model, result.rows, result.plan.device.torch)
    result = replace(result, plan=replace(result.plan, float8_layers=names))
    original, check = prove_trained(result, written, logits, trained_bytes=1)
    assert original["what"] == "The adapter on its base without float8"
    assert original["relative_logit_difference"] > check["tolerance"] > check["relative_logit_difference"]
    assert original["tolerance"] is None
    assert verify.is_merged_into_other_base(result)
