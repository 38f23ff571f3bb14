# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer validate` tells all that is wrong with a job at once, and what the job would train on."""

import json
import os
import re
import shutil
import subprocess
from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llm_trainer.cli.plan import examine_model, plan
from llm_trainer.cli.plan_instances import PlanOptions
from llm_trainer.cli.validate import examine_job, validate
from llm_trainer.cli.validation import format_text
from llm_trainer.common.errors import UserError
from llm_trainer.config.environment import read_environment
from llm_trainer.job.inputs import find_inputs
from llm_trainer.job.job import Job, collect_settings
from llm_trainer.launcher.launch import check_machine
from llm_trainer.model.device import Device
from llm_trainer.model.memory import shape, step_trace
from support.fake_hub import MODEL, FakeHub
from support.sagemaker_tree import LLM_TRAINER
from support.tiny_processors import save_processor
from support.tiny_vision_models import build_config
from support.waiting import GUARD_SECONDS

PRETOKENIZED = {"input_ids": [1, 50, 51, 2], "labels": [-100, 50, 51, 2]}
FORGETFUL_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% generation %}{{ message['content'] }}{% endgeneration %}<|im_end|>\n{% endfor %}"
)


@pytest.fixture
def run_validate(tree, tmp_path):
    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        places = {"SAGEMAKER_BASE_DIR": str(tree.base_dir), "LLM_TRAINER_CACHE": str(tmp_path)}
        return subprocess.run(
            [str(LLM_TRAINER), "validate", *arguments],
            env={**os.environ, **places, **variables},
            capture_output=True,
            text=True,
            timeout=GUARD_SECONDS,
            check=False,
        )

    return run


@pytest.fixture
def examine_tree(tree, tmp_path):
    """What the command finds out, in this process, whose environment it changes."""
    places = {"SAGEMAKER_BASE_DIR": str(tree.base_dir), "LLM_TRAINER_CACHE": str(tmp_path / "cache")}
    with patch.dict(os.environ, places):
        yield lambda *arguments, in_colour=False: examine_job(arguments, in_colour)


def write_rows(tree, *rows):
    tree.write("input/data/train/train.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))


def test_what_only_a_gpu_can_is_no_error_where_none_is(examine_tree):
    validation = examine_tree("--attn_implementation", "flash_attention_2", "--distribution", "fsdp")
    told = [finding for finding in validation.findings if finding.subject == "machine"]
    assert [finding.verdict for finding in told] == ["warning", "warning"]
    assert "distribution=fsdp with one process" in told[1].text


@pytest.mark.parametrize("is_required", [True, False])
def test_gpu_hosts_that_cannot_use_their_efa_are_stopped_by_both_commands(tree, examine_tree, monkeypatch, is_required):
    hosts = {"current_host": "algo-1", "hosts": ["algo-1", "algo-2"]}
    tree.write("input/config/resourceconfig.json", json.dumps(hosts))
    monkeypatch.setattr("llm_trainer.config.environment.count_gpus", lambda: 8)
    monkeypatch.setattr("llm_trainer.host.efa.find_efa_devices", lambda: ["rdmap0"])
    monkeypatch.setattr("llm_trainer.host.efa.find_verbs_devices", lambda: ["uverbs0"])
    words = ["--require_efa", str(is_required).lower()]
    (told,) = [finding for finding in examine_tree(*words).findings if finding.subject == "EFA"]
    assert told.verdict == ("error" if is_required else "warning")
    environment = read_environment()
    settings, _ = collect_settings(environment, words)
    inputs, _ = find_inputs(settings, environment, has_mistakes=False)
    with pytest.raises(UserError, match=r"EFA: .* or set require_efa=false") if is_required else nullcontext():
        check_machine(Job(environment, settings, inputs))


def test_what_a_gpu_has_to_hold_is_told_without_one(examine_tree):
    validation = examine_tree()
    plain, checkpointed = (validation.memory[way] for way in ("training", "training with gradient checkpointing"))
    assert plain["parts"]["base weights"] == checkpointed["parts"]["base weights"] > 0
    assert plain["parts"]["activations"] > checkpointed["parts"]["activations"]
    assert plain["gpu_gib"] == 16
    assert validation.describe()["memory"].keys() == {"training", "training with gradient checkpointing"}
    table = "\n".join(format_text(validation, in_colour=False))
    assert re.search(r"^CUDA +0\.59 +0\.59$", table, re.MULTILINE)
    assert "NCCL" not in table  # of which one GPU has no use


def test_the_pieces_of_a_global_batch_are_told_for_the_devices_that_are_asked_for(tree, examine_tree):
    tree.change(per_device_train_batch_size=None)
    validation = examine_tree("--nproc_per_node", "4", "--global_batch_size", "32")
    told = [finding.text for finding in validation.findings if finding.subject == "batch"]
    assert told == [
        "global batch 32 rows = 1 a device x 4 devices x 8 accumulation steps",
        "global batch 32 rows = 8 a device x 4 devices x 1 accumulation steps",
    ]
    few, many = (validation.memory[f"training of {rows} rows a device"] for rows in (1, 8))
    assert few["parts"]["activations"] < many["parts"]["activations"]


@pytest.mark.parametrize(("words", "verdict"), [(("--nproc_per_node", "3"), "errors"), ((), "warnings")])
def test_a_global_batch_that_devices_cannot_share_is_told_by_both_commands(tree, examine_tree, words, verdict):
    words = (*words, "--global_batch_size", "32", "--per_device_train_batch_size", "3")
    problem = f"global_batch_size=32 cannot be shared by {3 if words[1] == '3' else 1} devices"
    for validation in (examine_tree(*words), examine_model(words)):
        told = validation.list_texts("error" if verdict == "errors" else "warning")
        assert sum(problem in text for text in told) == 1


def test_an_adapter_that_servers_cannot_load_is_told_before_the_training(tree, examine_tree):
    config = tree.base_dir / "input/data/model/config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "qwen2"'))
    (config.parent / "model.safetensors").unlink()  # it has none of the biases of a qwen2

    warnings = examine_tree("--target_modules", "embed_tokens").list_texts("warning")
    assert any("it sits on embed_tokens, which vLLM adapts in no qwen2" in text for text in warnings)
    (problem,) = examine_tree("--target_modules", "lm_head").list_texts("error")
    assert problem.startswith("target_modules: lm_head is the output layer")


def test_a_good_job_is_shown_to_a_person(tree, examine_tree, capsys):
    assert validate([], as_json=False) == 0
    shown = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    assert "settings ok 5 given" in lines
    assert "train ok train: messages rows, trained on: assistant turns" in lines
    assert "train warning 4 rows of the train data are in the validation data too." in lines
    assert "train 32 1,249 5.2% 39 39 39 40 40 0 0 0 0 4" in lines
    assert "⟦0<|im_end|>⟧" in lines
    assert lines[-1] == "errors: 0, warnings: 1; this job would start."
    assert "\033" not in shown
    assert not (tree.base_dir / "model").exists()
    assert not (tree.base_dir / "output").exists()


def test_a_model_is_planned_without_any_data(tiny_model, tmp_path):
    with patch.dict(os.environ, {"SAGEMAKER_BASE_DIR": str(tmp_path)}):
        planned = examine_model(["--model_id", str(tiny_model), "--max_length", "64"])
        mistaken = examine_model(["--lora_rnak", "3"])
    assert planned.list_texts("error") == []
    assert any(text.startswith("Precision: bfloat16 (auto: a GPU elsewhere (9.0)") for text in planned.list_texts("ok"))
    assert "for rows of 64 tokens, which data may stay below" in planned.list_texts("ok")
    assert planned.memory["training"]["total_bytes"] > 0
    assert [text.split()[0] for text in mistaken.list_texts("error")] == ["Hyperparameter", "model_id"]


@pytest.mark.parametrize("gpus", [0, 8])
def test_a_plan_asks_the_gpus_of_instances_and_not_this_machine(tiny_model, tmp_path, monkeypatch, gpus):
    if gpus:  # an old GPU, too small for the job, and so many that the batch cannot be shared
        old = Device(torch.device("cuda"), "Tesla T4", (7, 5))
        monkeypatch.setattr("llm_trainer.model.device.find_device", lambda use_cpu: old)
        driver = SimpleNamespace(gpus=[SimpleNamespace(memory_bytes=2**20)] * gpus)
        monkeypatch.setattr("llm_trainer.cli.gpu_memory.read_driver", lambda: driver)
    monkeypatch.setattr("llm_trainer.config.environment.count_gpus", lambda: gpus)
    words = ["--base_compute=fp8", "--attn_implementation=flash_attention_2", "--use_liger_kernel", "--max_length=64"]
    with patch.dict(os.environ, {"SAGEMAKER_BASE_DIR": str(tmp_path)}):
        planned = examine_model(["--model_id", str(tiny_model), *words, "--global_batch_size", "4"])
    assert planned.list_texts("error") == []
    fits = {entry["gpu"]: entry["fits"] for entry in planned.instances["instances"] if entry["gpus"] == 1}
    assert fits == {"T4": False, "A10G": False} | dict.fromkeys(fits.keys() - {"T4", "A10G"}, True)
    assert len(fits) > 4
    told = {finding.text for finding in planned.findings if finding.subject == "here"}
    assert any("Tesla T4 (7.5)" in text for text in told) == bool(gpus)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"region": "us-east-1"}, "is no price file"),
        ("{", "is not valid JSON"),
        (
            {
                "region": "us-east-1",
                "asked_at": "2020-01-01T00:00:00Z",
                "currency": "USD",
                "on_demand": {"ml.g5.xlarge": 1.4},
            },
            "days old",
        ),
    ],
)
def test_prices_of_a_job_that_are_damaged_or_old_are_told_by_both_commands(tree, examine_tree, content, told):
    tree.write("input/data/config/prices.json", content)
    channels = {name: {} for name in ("model", "train", "validation", "config")}
    tree.write("input/config/inputdataconfig.json", channels)
    (warning,) = [text for text in examine_tree().list_texts("warning") if "price" in text]
    assert told in warning
    with patch.dict(os.environ, {"SAGEMAKER_BASE_DIR": str(tree.base_dir), **tree.environment}):
        planned = examine_model([], PlanOptions(rows=10, tokens_per_row=10))
    assert warning in [*planned.list_texts("error"), *planned.list_texts("warning")]
    assert bool(planned.instances) == (told == "days old")


def test_a_plan_reads_the_model_once_and_traces_each_step_once(tiny_model, tmp_path, monkeypatch):
    read, traced = [], []
    run, build = step_trace.run_fake_step, shape.build_on_meta
    monkeypatch.setattr(step_trace, "run_fake_step", lambda of, step: traced.append((of, step)) or run(of, step))
    monkeypatch.setattr(shape, "build_on_meta", lambda *given: read.append(given) or build(*given))
    words = ["--model_id", str(tiny_model), "--max_length=64", "--global_batch_size=8"]
    with patch.dict(os.environ, {"SAGEMAKER_BASE_DIR": str(tmp_path)}):
        planned = examine_model(words)
    assert len(planned.instances["instances"]) > 500
    assert len(read) == 1
    assert len(traced) == len({(of.weights_dtype, step) for of, step in traced})


def test_all_options_that_are_wrong_are_told_at_once_and_before_the_model_is_read(tmp_path):
    words, price_file = ["--model_id", str(tmp_path / "none"), "--lora_rnak", "3"], str(tmp_path / "none.json")
    options = PlanOptions(rows=-1, tokens_per_row=0, prices_file=price_file, learn_from=[str(tmp_path / "no")])
    with patch.dict(os.environ, {"SAGEMAKER_BASE_DIR": str(tmp_path)}):
        told = examine_model(words, options).list_texts("error")
        asked = examine_model(words, PlanOptions(asks_prices=True, region="eu-nowhere-1")).list_texts("error")
    starts = ("Hyperparameter 'lora_rnak'", f"model_id='{tmp_path}", "--rows and", f"--learn {tmp_path}", price_file)
    assert len(told) == len(starts)
    assert all(any(text.startswith(start) for text in told) for start in starts), told
    assert len(asked) == 2  # nothing is asked of AWS for a job that is wrong


def test_a_plan_needs_no_more_than_config_json(tiny_model, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copyfile(tiny_model / "config.json", folder / "config.json")
    with patch.dict(os.environ, {"SAGEMAKER_BASE_DIR": str(tmp_path), "LLM_TRAINER_CACHE": str(tmp_path)}):
        planned = examine_model(["--model_id", str(folder), "--load_in_4bit"])
        validation = examine_job(["--model_id", str(folder)], in_colour=False)
    assert planned.list_texts("error") == []
    assert planned.memory["training"]["parts"]["base weights"] > 0
    assert any("has no tokenizer" in text for text in validation.list_texts("error"))


def test_a_plan_of_a_hub_model_reads_no_more_than_its_config(fake_hub, examine_tree, capsys):
    fake_hub.files = {"config.json": fake_hub.files["config.json"]}
    assert plan(["--model_id", MODEL], as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["memory"]["training"]["total_bytes"] > 0


def test_several_mistakes_are_told_at_once_to_a_machine_and_no_secret_is(tree, run_validate):
    weights = tree.base_dir / "input/data/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with (tree.base_dir / "input/data/train/train.jsonl").open("a") as file:
        file.write("{\n")
    tree.write("input/data/validation/validation.json", [{**PRETOKENIZED, "labels": [-100] * 4}])
    tree.change(lora_dropout="1.5", lora_rnak="8", wandb_token="hunter2")
    imports = {"PYTHONPROFILEIMPORTTIME": "1"}  # Python tells them on stderr
    result = run_validate("--json", "--token", "hunter2", "stray", HF_TOKEN="hunter2", **imports)
    assert result.returncode == 1
    assert "torch.nn" in result.stderr
    assert not re.search(r"\b(bitsandbytes|scipy)\.", result.stderr)  # this job has no use for them
    assert "hunter2" not in result.stdout + result.stderr
    values = json.loads(result.stdout)
    assert not values["ok"]
    words = [
        "stray",
        "lora_rnak",
        "lora_dropout='1.5'",
        "it was cut off",
        "train.jsonl line 33",
        "No token of the valid",
    ]
    for word in words:
        assert any(word in problem for problem in values["problems"]), word
    assert len(values["problems"]) == len(words)
    assert values["data"]["train"]["num_rows"] == 32
    assert values["data"]["train"]["length_percentiles"]["p50"] == 39
    assert "⟦0<|im_end|>⟧" in values["sample"]
    assert values["settings"]["wandb_token"] == "***"
    assert (tree.base_dir / "output/data/rejected_rows.jsonl").exists()


def test_a_hub_model_is_judged_without_its_weights(tree, tiny_model, run_validate, tmp_path):
    server = FakeHub(tiny_model)
    server.refuse(429, times=1)  # the wait is told, and not on stdout
    try:
        arguments = ("--json", "--model_id", MODEL)
        result = run_validate(*arguments, HF_ENDPOINT=server.endpoint, HF_HOME=str(tmp_path / "hub"))
    finally:
        server.close()
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads(result.stdout)["data"]["train"]["num_rows"] == 32
    assert any(request.endswith("tokenizer.json") for request in server.requests)
    asked = [request.split()[0] for request in server.requests if "safetensors" in request]
    assert asked == ["HEAD"]  # their size


@pytest.mark.parametrize("at_once", [pytest.param(True, marks=pytest.mark.long), False])
def test_a_hub_model_without_room_is_told(tree, tiny_model, run_validate, tmp_path, at_once):
    server = FakeHub(tiny_model)
    server.told_sizes = {"model.safetensors": 2**60}
    tree.change(use_cpu=True, use_snapshot_download=at_once)  # this machine is the job's
    try:
        arguments = ("--json", "--model_id", MODEL)
        result = run_validate(*arguments, HF_ENDPOINT=server.endpoint, HF_HOME=str(tmp_path / "hub"))
    finally:
        server.close()
    assert result.returncode == 1
    (problem,) = json.loads(result.stdout)["problems"]
    assert problem.startswith(f"model_id='{MODEL}' has 1073741824 GiB of weights to download, and ")
    assert f"free in {tmp_path}/hub/hub: raise VolumeSizeInGB" in problem
    assert not any(request.startswith("GET") and "safetensors" in request for request in server.requests)


def test_weights_and_gpu_are_not_needed(tree, examine_tree):
    (tree.base_dir / "input/data/model/model.safetensors").unlink()
    validation = examine_tree()
    assert not validation.list_texts("error")
    assert any("has no weights" in text for text in validation.list_texts("warning"))
    assert validation.reports["train"].num_rows == 32


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({**PRETOKENIZED, "labels": [-100] * 4}, "No token of the train data is trained on"),
        ({**PRETOKENIZED, "labels": [-100, 50, 51, -100]}, "train on a turn without the end-of-sequence token"),
        ({"input_ids": [1, 9999, 2]}, "has the token id 9999 among its input_ids and the model's vocabulary ends"),
        ({"input_ids": [1, 1, 50, 2]}, "begins with two BOS tokens"),
    ],
)
def test_rows_that_cannot_be_trained_on_are_told(tree, examine_tree, row, problem):
    write_rows(tree, row)
    (told,) = examine_tree().list_texts("error")
    assert problem in told


def test_preferences_are_counted_as_pairs_and_shown_with_both_sides(tree, examine_tree):
    question = {"role": "user", "content": "Is it?"}
    chosen, rejected = ([question, {"role": "assistant", "content": text}] for text in ("Yes, it is.", "No."))
    row = {"prompt": "Is it?", "chosen": chosen, "rejected": rejected, "score_chosen": 1, "score_rejected": 2}
    write_rows(tree, row, {**row, "rejected": chosen})
    tree.write(
        "input/data/validation/validation.json", json.dumps({**row, "prompt": "?", "chosen": "a", "rejected": "b"})
    )
    validation = examine_tree("--method", "dpo")
    data = validation.describe()["data"]["train"]
    assert (data["num_rows"], data["formats"]) == (1, {"train": "preference"})
    assert (data["pairs"]["equal"], data["pairs"]["swapped"]) == (1, 2)
    assert data["pairs"]["chosen_tokens"]["mean"] > 1.2 * data["pairs"]["rejected_tokens"]["mean"]
    text = "\n".join(format_text(validation, in_colour=False))
    assert "train 1 2 0 12 12 12 8 12 12" in [" ".join(line.split()) for line in text.splitlines()]
    assert "between ⟦ and ⟧: chosen, between ⟪ and ⟫: rejected" in text
    assert "Is it?<|im_end|>\n<|im_start|>assistant\n\n⟦Yes, it is.<|im_end|>⟧\n\n⟪No.<|im_end|>⟫\n" in text
    warnings = validation.list_texts("warning")
    assert any("longer than the rejected ones, 12 tokens on average to 8" in one for one in warnings)
    assert any(one.startswith("2 pairs of the train data have a lower score") for one in warnings)


def test_rows_of_another_method_are_told_once_with_the_method_to_set(examine_tree):
    problems = examine_tree("--method", "dpo").list_texts("error")
    told = [problem for problem in problems if "is a messages row, which method=dpo does not take" in problem]
    assert len(told) == 2  # of the training data and of the validation data
    assert all("set method=sft or distill, or give rows with 'chosen' with 'rejected'" in problem for problem in told)


def test_a_template_that_leaves_the_end_of_a_turn_out_is_told(tree, examine_tree):
    template = tree.write("template.jinja", FORGETFUL_TEMPLATE)
    problems = examine_tree("--chat_template_path", str(template)).list_texts("error")
    assert [problem.partition(" data")[0] for problem in problems] == [
        "32 of 32 rows of the train",
        "4 of 4 rows of the validation",
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--per_device_train_batch_size", "20"), "32 rows fill no batch of 40 (per_device_train_batch_size=20 x 2"),
        (
            ("--packing", "true", "--max_length", "512"),
            "3 sequences fill no batch of 16 (per_device_train_batch_size=8",
        ),
    ],
)
def test_rows_that_fill_no_batch_of_all_hosts_are_told(tree, examine_tree, words, told):
    resources = json.loads((tree.base_dir / "input/config/resourceconfig.json").read_text())
    tree.write("input/config/resourceconfig.json", resources | {"hosts": ["algo-1", "algo-2"]})
    (problem,) = examine_tree("--dataloader_drop_last", "true", *words).list_texts("error")
    assert told in problem


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"reward_functions": '["math"]', "reward_options": '{"math": {"column": "truth"}}'}, "column 'truth'"),
        ({"per_device_train_batch_size": "64"}, "has 2 prompts, and completions of 16 are written at once"),
        ({"num_generations": "3"}, "num_generations=3 does not divide the 8 completions"),
        ({"reward_functions": '["rewards.py:grade"]'}, "reward_functions='rewards.py:grade'"),
    ],
)
def test_what_keeps_completions_from_being_rewarded_is_told(tree, examine_tree, options, told):
    shared = {"method": "grpo", "num_generations": "4", "per_device_train_batch_size": "8", "use_cpu": "true"}
    tree.change(**{**shared, "reward_functions": '["exact_match"]', **options})
    tree.write("input/data/train/train.jsonl", '{"question": "1 + 1?", "answer": 2}\n{"question": "2?", "answer": 2}\n')
    tree.write("input/data/validation/validation.json", [{"question": "1 + 2?", "answer": 3}])
    tree.write(
        "input/data/rewards/rewards.py", "def score(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    (error,) = examine_tree().list_texts("error")
    assert told in error


def test_a_group_that_several_devices_share_is_no_mistake_on_one(tree, examine_tree):
    tree.change(method="grpo", reward_functions='["exact_match"]', per_device_train_batch_size="1", nproc_per_node="4")
    tree.change(num_generations="4")
    tree.write("input/data/train/train.jsonl", '{"question": "1 + 1?", "answer": 2}\n')
    tree.write("input/data/validation/validation.json", [{"question": "1 + 2?", "answer": 3}])
    assert examine_tree().list_texts("error") == []


def test_a_missing_template_is_told(tree, examine_tree):
    (tree.base_dir / "input/data/model/chat_template.jinja").unlink()
    problems = examine_tree().list_texts("error")
    assert problems
    assert all("the model's tokenizer has no chat template" in problem for problem in problems)


def test_a_tokenizer_that_cannot_be_read_is_told(tree, examine_tree):
    tree.write("input/data/model/tokenizer.json", "{")
    validation = examine_tree()
    assert any("tokenizer.json is not valid JSON" in problem for problem in validation.list_texts("error"))
    assert not validation.reports


def test_what_the_result_would_come_without_is_told(tree, examine_tree):
    tree.write("input/data/model/README.md", f"---\nlicense: mit\ndeep: {'[' * 60_000}\n---\n")
    validation = examine_tree()
    assert not validation.list_texts("error")
    assert any("README.md are nested deeper than 32" in text for text in validation.list_texts("warning"))


def test_an_empty_tree_is_told(tree, examine_tree):
    for channel in ("model", "train", "validation"):
        (tree.base_dir / "input/data" / channel).rename(tree.base_dir / f"no-{channel}")
    tree.write("input/config/inputdataconfig.json", {})
    validation = examine_tree()
    assert [problem.split(":")[0] for problem in validation.list_texts("error")] == [
        "model_id is missing",
        "Training data is missing",
    ]
    assert not validation.describe()["ok"]


def test_a_tree_that_cannot_be_read_is_told(tree, examine_tree):
    tree.write("input/config/hyperparameters.json", "{'a': 1}")
    (problem,) = examine_tree().list_texts("error")
    assert "hyperparameters.json is not valid JSON" in problem


def test_a_script_of_the_users_is_left_to_the_user(tree, examine_tree):
    tree.change(sagemaker_program="train.py")
    validation = examine_tree()
    assert [finding.subject for finding in validation.findings] == ["script"]
    assert list(format_text(validation, in_colour=False))[-1] == "errors: 0, warnings: 1; this job would start."


def test_the_first_errors_are_shown_and_the_others_counted(tree, examine_tree):
    tree.change(**{f"unknown_{number}": "1" for number in range(25)})
    lines = list(format_text(examine_tree(), in_colour=False))
    assert len([line for line in lines if re.match(r"settings +error", line)]) == 20
    assert "and 5 more errors, which --json lists." in lines
    assert lines[-1].startswith("errors: 25,")


def test_a_terminal_shows_in_colour_what_is_trained_on(examine_tree):
    text = "\n".join(format_text(examine_tree(in_colour=True), in_colour=True))
    assert "\033[32m0<|im_end|>\033[0m" in text
    assert "green: trained on" in text


def test_an_output_folder_that_cannot_be_written_is_told_beside_all_else(tree, examine_tree):
    write_rows(tree, {"messages": 1})
    tree.write("output", "a file where the folder should be")
    validation = examine_tree()
    assert any("train.jsonl row 1" in problem for problem in validation.list_texts("error"))
    output = tree.base_dir / "output"
    assert f"output: {output} is a file: give a folder." in validation.list_texts("error")


def test_an_earlier_adapter_is_judged_on_the_model_and_counted_with_its_rank(tree, examine_tree, tiny_model):
    channel = tree.base_dir / "input/data/adapter"
    config = LoraConfig(task_type="CAUSAL_LM", r=5, target_modules=["q_proj", "lm_head"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(channel)
    names = ("model", "train", "validation", "adapter")
    tree.write("input/config/inputdataconfig.json", {name: {} for name in names})
    (problem,) = examine_tree().list_texts("error")
    assert problem.startswith(f"The adapter in {channel} cannot be trained here: target_modules: lm_head is the output")
    (problem,) = examine_tree("--lora_r", "8").list_texts("error")
    assert problem.startswith(f"lora_r=8: the adapter in {channel}, which the training goes on from, has 5")

    config = LoraConfig(task_type="CAUSAL_LM", r=5, target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(channel)
    validation = examine_tree()
    assert not validation.list_texts("error")
    assert f"adapter to go on from: {channel}" in validation.list_texts("ok")
    line = f"Adapter: LoRA of rank 5 and alpha 8, as in {channel}"
    assert any(text.startswith(line) for text in validation.list_texts("ok"))
    planned = examine_model(["--model_id", str(tiny_model), "--adapter_path", str(channel)])
    assert not planned.list_texts("error")
    assert any(text.startswith(line) for text in planned.list_texts("ok"))
    weights = 2 * 5 * (32 + 32)  # layers x rank x (rows + columns)
    assert planned.memory["training"]["parts"]["adapter"] == 4 * weights


def test_a_plan_counts_the_rows_of_the_channel_and_needs_both_numbers_in_their_place(tree):
    with patch.dict(os.environ, {"SAGEMAKER_BASE_DIR": str(tree.base_dir), **tree.environment}):
        counted = examine_model([])
        given = examine_model([], PlanOptions(rows=1000, tokens_per_row=50))
        half = examine_model([], PlanOptions(rows=1000))
    assert not counted.list_texts("error")
    assert counted.instances["instances"][0]["hours"] > 0
    assert given.instances["instances"][0]["steps"] > counted.instances["instances"][0]["steps"]
    assert counted.instances["cheapest"]["settings"]["per_device_train_batch_size"]
    assert "stand for data together" in half.list_texts("error")[0]


def test_a_plan_counts_images_that_are_not_there(tmp_path):
    build_config("qwen", save_processor("qwen", tmp_path)).save_pretrained(tmp_path)
    rows = {"rows": 100, "tokens_per_row": 20}
    texts, seen = (
        examine_model(["--model_id", str(tmp_path)], PlanOptions(**rows, images_per_row=images))
        for images in (None, "2x1000x600")
    )
    assert not seen.list_texts("error")
    pixels = [found.memory["training"]["parts"]["pixels"] for found in (texts, seen)]
    assert pixels[0] == 0 < pixels[1]
    first = [found.instances["instances"][0] for found in (texts, seen)]
    assert first[0]["steps"] == first[1]["steps"]
    assert first[0]["step_seconds"] < first[1]["step_seconds"]


@pytest.mark.parametrize(
    ("images", "told"),
    [("many", "is no number and size of images"), ("1x64x64", "and the model takes texts alone")],
)
def test_images_that_cannot_be_planned_are_told(tiny_model, images, told):
    found = examine_model(["--model_id", str(tiny_model)], PlanOptions(images_per_row=images))
    (problem,) = found.list_texts("error")
    assert told in problem


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--packing", "true"], "with packing=true, which takes no images"),
        (["--streaming", "true", "--max_steps", "3"], "with streaming=true, which takes no images"),
        (["--method", "kto"], "with method=kto, whose rows have no images"),
    ],
)
def test_a_plan_counts_no_images_where_a_job_takes_none(tmp_path, given, told):
    build_config("qwen", save_processor("qwen", tmp_path)).save_pretrained(tmp_path)
    found = examine_model(["--model_id", str(tmp_path), *given], PlanOptions(images_per_row="1x64x64"))
    assert [text for text in found.list_texts("error") if told in text]
