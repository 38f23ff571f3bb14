# SPDX-License-Identifier: Apache-2.0
"""An earlier adapter is found, judged and taken over before anything heavy starts, each mistake in one sentence."""

import json
import tarfile
import tempfile

import pytest
import torch
from safetensors.torch import save_file

from llm_trainer.common.errors import UserError
from llm_trainer.config.environment import read_environment
from llm_trainer.config.load import read_settings
from llm_trainer.config.schema import Settings
from llm_trainer.job import earlier_adapter
from llm_trainer.job.inputs import find_inputs
from llm_trainer.job.job import fetch_earlier_adapter, read_job
from llm_trainer.launcher.worker_processes import reads_from_hub

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 16,
    "lora_alpha": 24,
    "lora_dropout": 0.25,
    "target_modules": ["q_proj"],
    "use_dora": True,
}


def write_adapter(folder, **fields):
    """Write the files of an adapter; a field that is None is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in {**CONFIG, **fields}.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(2, 2)}, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def channel(tree, monkeypatch):
    """The channel `adapter` of the tree's job, with an adapter."""
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    monkeypatch.setattr(tempfile, "tempdir", str(tree.base_dir))
    tree.change(lora_dropout=None)
    names = ("model", "train", "validation", "adapter")
    tree.write("input/config/inputdataconfig.json", {name: {} for name in names})
    return write_adapter(tree.base_dir / "input/data/adapter")


def find_problems():
    environment = read_environment()
    settings, problems = read_settings(environment, {})
    return [*problems, *find_inputs(settings, environment)[1]]


def test_the_job_has_the_adapters_rank_and_kind_and_its_own_wishes(tree, channel):
    tree.change(lora_dropout="0.5", target_modules='["q_proj"]')
    job = read_job([])
    adapter = job.settings.adapter
    assert (adapter.lora_r, adapter.lora_alpha, adapter.use_dora, adapter.use_rslora) == (16, 24, True, False)
    assert adapter.lora_dropout == 0.5
    assert adapter.adapter_path == job.inputs.adapter == str(channel)
    assert not job.settings.is_given("lora_r")
    tree.change(lora_dropout=None)
    assert read_job([]).settings.adapter.lora_dropout == 0.25


def test_without_an_adapter_nothing_is_taken_over(tree, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    job = read_job([])
    assert job.inputs.adapter == ""
    assert job.settings.adapter.adapter_path is None
    assert fetch_earlier_adapter(job, tree.base_dir) is job


@pytest.mark.parametrize("where", ["deeper", "hub/models--org--name/snapshots/abc", "archive", "merged"])
def test_it_is_found_where_it_leaves_no_doubt(tree, channel, where):
    if where in ("archive", "merged"):
        with tarfile.open(channel / "model.tar.gz", "w:gz") as archive:
            inner = "." if where == "archive" else "adapter"
            archive.add(channel, inner, filter=lambda member: None if "model.tar" in member.name else member)
            if where == "merged":
                archive.add(tree.base_dir / "input/data/model", ".")
    else:
        write_adapter(channel / where)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (channel / name).unlink()
    assert not find_problems()
    job = read_job([])
    assert job.settings.adapter.lora_r == 16
    assert job.inputs.adapter.endswith({"merged": "/adapter", "archive": ""}.get(where, where))


def test_a_path_comes_before_the_channel_and_a_hub_id_is_left_for_the_workers(tree, channel, monkeypatch):
    other = write_adapter(tree.base_dir / "other", r=4)
    tree.change(adapter_path=str(other))
    assert read_job([]).settings.adapter.lora_r == 4
    tree.change(adapter_path="org/name", adapter_revision="v2")
    job = read_job([])
    assert job.inputs.adapter == "org/name"
    assert job.settings.adapter.lora_r == 8
    assert reads_from_hub(job.inputs, None)
    asked = []
    monkeypatch.setattr(earlier_adapter, "download_adapter", lambda *given: asked.append(given) or str(other))
    fetched = fetch_earlier_adapter(job, tree.base_dir)
    assert asked == [("org/name", "v2", ["training_manifest.json"])]
    assert fetched.settings.adapter.lora_r == 4
    assert fetched.settings.adapter.adapter_path == str(other)
    assert fetched.inputs.adapter == "org/name"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"lora_r": "8"}, "lora_r=8: the adapter in {}, which the training goes on from, has 16; remove lora_r."),
        ({"lora_alpha": "1"}, "lora_alpha=1.0: the adapter in {}, which the training goes on from, has 24.0; remove "),
        ({"use_dora": "false"}, "use_dora=false: the adapter in {}, which the training goes on from, has true; remove"),
        ({"use_rslora": "true"}, "use_rslora=true: the adapter in {}, which the training goes on from, has false; "),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights=gaussian with the adapter in {}: the training goes on "),
        (
            {"use_peft": "false"},
            "channel 'adapter' with use_peft=false: full fine-tuning has no adapter to go on from; ",
        ),
        ({"use_peft": "false", "adapter_path": "a/b"}, "adapter_path='a/b' with use_peft=false: full fine-tuning has "),
        (
            {"merge_adapter": "true"},
            "merge_adapter=true without merge_weights=true: the new adapter is for the merged ",
        ),
        ({"adapter_path": "s3://a/b"}, "adapter_path='s3://a/b' is an address, and an adapter is read from a folder: "),
        ({"adapter_path": "/none"}, "adapter_path='/none' is neither a folder in the container nor a Hugging Face id:"),
        ({"adapter_revision": "v1"}, "adapter_revision='v1' without adapter_path: it would do nothing; give the "),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_what_contradicts_the_adapter_is_refused_in_one_sentence(tree, channel, settings, sentence):
    tree.change(**settings)
    (problem,) = find_problems()
    assert problem.startswith(sentence.format(channel))


def test_an_adapter_that_is_merged_first_tells_nothing_of_the_new_one(tree, channel):
    tree.change(merge_adapter="true", merge_weights="true", lora_r="4", init_lora_weights="pissa")
    assert not find_problems()
    adapter = read_job([]).settings.adapter
    assert (adapter.adapter_path, adapter.lora_r, adapter.use_dora, adapter.goes_on) == (str(channel), 4, False, False)


@pytest.mark.parametrize("settings", [{"use_peft": "false"}, {"method": "reward", "merge_weights": "true"}], ids=str)
def test_all_weights_and_reward_models_begin_with_a_merged_adapter(tree, channel, settings):
    tree.change(merge_adapter="true", **settings)
    assert not [text for text in find_problems() if "adapter" in text]


def test_there_has_to_be_an_adapter_to_merge(tree, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tree.base_dir))
    tree.change(merge_adapter="true", merge_weights="true")
    (problem,) = find_problems()
    assert problem.startswith("merge_adapter=true without an earlier adapter: give one as channel 'adapter'")


def test_the_same_values_contradict_nothing(tree, channel):
    tree.change(lora_r="16", lora_alpha="24", use_dora="true", use_rslora="false", init_lora_weights="default")
    assert not find_problems()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"peft_type": "IA3"}, "{}/adapter_config.json has peft_type='IA3': only a LoRA adapter can be gone on from; "),
        ({"task_type": "SEQ_CLS"}, "{}/adapter_config.json has task_type='SEQ_CLS': give the adapter of a causal "),
        ({"r": "many"}, "{}/adapter_config.json has r='many', which no LoRA adapter has: give the file as PEFT saved"),
        ({"target_modules": {"a": 1}}, "{}/adapter_config.json has target_modules={{'a': 1}}, which no LoRA adapter "),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_is_no_lora_adapters_is_refused(channel, fields, sentence):
    write_adapter(channel, **fields)
    (problem,) = find_problems()
    assert problem.startswith(sentence.format(channel))


def test_weights_are_read_as_safetensors_alone(channel):
    weights = channel / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "it was cut off" in find_problems()[0]
    weights.rename(channel / "adapter_model.bin")
    (problem,) = find_problems()
    assert problem.startswith(f"Adapter folder {channel} has adapter_model.bin and no adapter_model.safetensors, and")
    (channel / "adapter_model.bin").unlink()
    (problem,) = find_problems()
    assert problem.startswith(f"Adapter folder {channel} has no adapter_model.safetensors: put the adapter's weights")
    (channel / "adapter_config.json").unlink()
    (problem,) = find_problems()
    assert problem.startswith(f"Adapter folder {channel} has no adapter_config.json: give the folder that an adapter")


def test_the_lineage_is_told_with_what_the_manifests_say(channel):
    settings = Settings().adapter
    (entry,) = earlier_adapter.describe_lineage("org/name", channel)
    assert entry["adapter"] == "org/name"
    assert len(entry["sha256"]) == 64
    assert entry["training_job_name"] is None
    older = {"adapter": "/old", "sha256": "00", "training_job_name": "one", "num_steps": 1, "model": "b", "odd": {}}
    manifest = {"training_job_name": "two", "num_steps": 5, "model": "base", "lineage": [older, "nonsense"]}
    (channel / "training_manifest.json").write_text(json.dumps(manifest))
    first, second = earlier_adapter.describe_lineage("org/name", channel)
    assert (first["training_job_name"], first["num_steps"], first["model"]) == ("two", 5, "base")
    assert second == {name: value for name, value in older.items() if name != "odd"}
    assert earlier_adapter.take_over(settings, str(channel)).lora_r == 16
    with pytest.raises(UserError, match="lora_r=8: "):
        earlier_adapter.take_over(Settings(lora_r=8).adapter, str(channel))


@pytest.mark.parametrize(
    ("base", "revision", "words"),
    [
        ("meta-llama/Llama-3", None, None),
        ("unsloth/llama-3", None, None),
        ("/opt/ml/input/data/model", None, None),
        (None, None, None),
        ("Qwen/Qwen3", None, "names 'Qwen/Qwen3' as the adapter's base, and the job's model is 'meta-llama/Llama-3'"),
        ("meta-llama/Llama-3", "abc", "names revision 'abc' of the adapter's base, and model_revision is 'main'."),
    ],
)
def test_a_base_of_another_name_is_a_warning_at_most(channel, base, revision, words):
    write_adapter(channel, base_model_name_or_path=base, revision=revision)
    found = list(earlier_adapter.find_base_warnings(channel, "meta-llama/Llama-3", "main"))
    assert len(found) == bool(words)
    assert all(words in text for text in found)
    (channel / "training_manifest.json").write_text('{"base_digest": "00"}')
    assert not list(earlier_adapter.find_base_warnings(channel, "meta-llama/Llama-3", "main"))
