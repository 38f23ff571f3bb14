# SPDX-License-Identifier: Apache-2.0
"""What a job will write is estimated, and told where the disk has no room for it."""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llm_trainer.config.environment import read_environment
from llm_trainer.config.schema import Settings
from llm_trainer.host.free_space import inspect_disk
from llm_trainer.job.disk_budget import BaseWeights, WriteSettings, estimate_writes, inspect_disk_need, read_base
from llm_trainer.job.inputs import find_inputs


def sections(**given):
    settings = Settings(**given)
    return WriteSettings(settings.adapter, settings.training, settings.output)


@pytest.fixture
def inputs(tree, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    return find_inputs(Settings(), read_environment())[0]


@pytest.fixture
def tensors(tree):
    return load_file(tree.base_dir / "input/data/model/model.safetensors").values()


def sizes(inputs, **settings):
    return [size for _, _, size in estimate_writes(sections(**settings), inputs, Path("/tmp"), read_base(inputs.model))]


def test_an_adapter_and_its_checkpoints_are_small(inputs, tensors):
    adapter_bytes = 4 * 16 * sum(sum(tensor.shape) for tensor in tensors if tensor.dim() == 2)
    result, checkpoints, _ = sizes(inputs, lora_r=16)
    assert (result, checkpoints) == (adapter_bytes, 3 * 3 * adapter_bytes)


def test_full_fine_tuning_writes_weights_and_optimizer_states(inputs, tensors):
    file_bytes = Path(inputs.model, "model.safetensors").stat().st_size
    state_bytes = (4 + 8) * sum(tensor.numel() for tensor in tensors)
    assert sizes(inputs, use_peft=False)[:2] == [file_bytes, 3 * state_bytes]
    assert sizes(inputs, use_peft=False, save_total_limit=5)[1] == 6 * state_bytes
    assert sizes(inputs, use_peft=False, use_checkpoints=False)[1] == 0
    assert sizes(inputs, merge_weights=True)[0] == file_bytes


def test_tokens_take_twice_the_room_of_the_data(inputs):
    files = [file for source in (*inputs.train, *inputs.validation) for file in source.files]
    assert sizes(inputs)[2] == 2 * sum(file.stat().st_size for file in files)


def test_a_file_that_goes_away_takes_no_room(inputs):
    before = sizes(inputs)[2]
    file = inputs.train[0].files[0]
    num_bytes = file.stat().st_size
    file.unlink()
    file.symlink_to("/nowhere")
    assert sizes(inputs)[2] == before - 2 * num_bytes


def test_a_disk_without_room_for_the_job_is_told_with_numbers(inputs, tmp_path):
    (finding,) = inspect_disk_need(sections(use_peft=False), inputs, tmp_path)
    assert finding.verdict == "ok"
    (finding,) = inspect_disk_need(sections(use_peft=False, save_total_limit=10**9), inputs, tmp_path)
    assert finding.verdict == "warning"
    assert finding.text.startswith("the job writes about ")
    assert f"GiB in {inputs.checkpoint_dir}): raise VolumeSize" in finding.text


def test_each_disk_is_judged_by_itself(inputs, tree):
    tree.write("input/data/train/train.jsonl", bytes(10**6))
    findings = list(inspect_disk_need(sections(use_peft=False), inputs, Path("/dev/shm/cache")))
    assert len(findings) == 2
    assert "tokenized data 2 MiB in /dev/shm/cache" in findings[1].text


def test_nothing_is_told_where_next_to_nothing_is_written(inputs, tmp_path):
    assert not list(inspect_disk_need(sections(use_checkpoints=False), inputs, tmp_path))


def test_what_the_hub_still_has_counts_with_the_rest(inputs, tmp_path):
    base = BaseWeights(2 * 2**30, [[2**15, 2**15]], (tmp_path, 2**30))
    hub_inputs = replace(inputs, model="tiny/model")
    given = sections(use_peft=False, use_checkpoints=False)
    (finding,) = inspect_disk_need(given, hub_inputs, tmp_path, base)
    assert "the job writes about 3 GiB, and " in finding.text
    assert f"(download 1 GiB in {tmp_path}, result 2 GiB in " in finding.text
    assert not list(inspect_disk_need(given, hub_inputs, tmp_path))


def test_a_full_disk_is_told():
    finding = inspect_disk("disk", Path("/proc"))
    assert finding.verdict == "warning"
    assert finding.text.startswith("0 MiB free on /proc")
