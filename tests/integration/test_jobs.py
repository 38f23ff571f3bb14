# SPDX-License-Identifier: Apache-2.0
"""Whole jobs in real processes, from a SageMaker tree to what lies in /opt/ml/model."""

import json
import os
import re
import stat
from itertools import pairwise

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_trainer.common.metric_definitions import define_metrics
from llm_trainer.journal.journal import read_records
from llm_trainer.journal.records import KINDS, SCHEMA_VERSION
from llm_trainer.planning.learning import read_lesson
from support.journals import list_fields
from support.sagemaker_tree import metrics_of

ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
PHASES = [
    *("check", "meeting", "launch", "imports", "download", "tokenizer", "data", "model", "packing"),
    *("first_step", "training", "export", "answers"),
]
SERVING_FILES = {"serving.properties", "serving.env", "adapters", "README.md"}
TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
# Run by every Python process that finds it on its path: leaves a list of what each worker imported.
RECORD_IMPORTS = """
import atexit, os, pathlib, sys
if "llm_trainer.worker" in sys.orig_argv:
    imported = lambda: [name for name, module in sys.modules.items() if module is not None]
    atexit.register(lambda: pathlib.Path(__file__).with_name("imports").write_text(" ".join(imported())))
"""


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 40).unsqueeze(0)).logits.float()


@pytest.fixture(scope="module")
def lora_job(make_tree):
    """A finished job with nothing but defaults and two clients' encodings in its hyperparameters."""
    tree = make_tree()
    tree.change(token="hf_secret", per_device_train_batch_size='"4"', use_peft="True", report_to="None")
    tree.change(gradient_accumulation_steps="2")
    tree.write("sitecustomize.py", RECORD_IMPORTS)
    resources = tree.base_dir / "input/config/resourceconfig.json"
    resources.write_text(resources.read_text().replace("ml.c5.xlarge", "ml.g5.2xlarge"))  # whose GPUs are planned
    tree.environment["PYTHONPATH"] = os.pathsep.join([str(tree.base_dir), os.environ.get("PYTHONPATH", "")])
    tree.result = tree.run()
    return tree


def test_what_was_planned_stands_beside_what_the_job_took(lora_job):
    manifest = json.loads((lora_job.base_dir / "model/training_manifest.json").read_text())
    compared = manifest["planned_and_actual"]
    planned, actual = compared["planned"], compared["actual"]
    assert (compared["gpu"], compared["count"]) == ("CPU", 1)
    assert planned["steps"] == manifest["num_steps"]
    assert planned["step_seconds"] > 0
    assert 0 < actual["step_seconds"] < 3600 * actual["hours"]
    assert 0 < actual["start_seconds"] < 3600 * actual["hours"]
    assert actual["memory_bytes"] == manifest["memory"]["measured_peak_bytes"]
    assert "Planned and actual: memory " in lora_job.result.stdout
    assert "A step, planned and actual" in (lora_job.base_dir / "output/data/report.html").read_text()
    lesson = read_lesson(lora_job.base_dir / "model")
    assert lesson.step_share == actual["step_seconds"] / planned["step_seconds"]


def test_a_job_on_a_gpu_instance_tells_what_others_would_take(lora_job):
    manifest = json.loads((lora_job.base_dir / "model/training_manifest.json").read_text())
    chosen = manifest["planned_and_actual"]["instances"]
    assert {*chosen} == {"cheapest", "fastest", "best_value"}
    assert chosen["fastest"]["hours"] <= chosen["cheapest"]["hours"]
    assert chosen["cheapest"]["settings"]["per_device_train_batch_size"] == 4
    page = (lora_job.base_dir / "output/data/report.html").read_text()
    assert "On other instances" in page
    assert chosen["best_value"]["instance_type"] in page


def test_a_job_ends_with_an_adapter_and_nothing_else(lora_job):
    assert lora_job.result.returncode == 0, lora_job.result.stdout
    assert not (lora_job.base_dir / "output/failure").exists()
    assert lora_job.model_files == ADAPTER_FILES | TOKENIZER_FILES | SERVING_FILES | {"training_manifest.json"}
    for file in (lora_job.base_dir / "model").rglob("*"):
        assert not file.is_symlink()
        assert stat.S_IMODE(file.stat().st_mode) == (0o755 if file.is_dir() else 0o644)
    assert lora_job.checkpoints[-1] == 4
    assert not any((lora_job.base_dir / "checkpoints").glob(".*"))


def test_the_adapter_loads_on_its_base_and_has_learned(lora_job):
    base = lora_job.base_dir / "input/data/model"
    before = logits_of(AutoModelForCausalLM.from_pretrained(base))
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), lora_job.base_dir / "model")
    assert (logits_of(adapted) - before).abs().max() > 0.01
    losses = metrics_of(lora_job.result.stdout, "train_loss")
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert metrics_of(lora_job.result.stdout, "eval_loss")
    assert all(speed > 0 for speed in metrics_of(lora_job.result.stdout, "tokens_per_second"))


def test_the_metric_definitions_read_every_key_of_the_log(lora_job):
    lines = lora_job.result.stdout.splitlines()
    metric_lines = [line for line in lines if re.match(r"\w+=[^;]+; ", line)]
    keys = {pair.partition("=")[0] for line in metric_lines for pair in line.split("; ")}
    read = {
        definition["Name"]: [float(value) for line in lines for value in re.findall(definition["Regex"], line)]
        for definition in define_metrics()
    }
    assert {"train_loss", "eval_loss", "tokens_per_second"} < keys
    assert {name for name, values in read.items() if values} == keys
    for key in keys:
        assert read[key] == metrics_of(lora_job.result.stdout, key)


def test_the_saved_tokenizer_renders_the_same_chat(lora_job):
    messages = [{"role": "user", "content": "hi"}]
    base, saved = (AutoTokenizer.from_pretrained(lora_job.base_dir / path) for path in ("input/data/model", "model"))
    assert saved.chat_template == base.chat_template
    assert saved.apply_chat_template(messages) == base.apply_chat_template(messages)
    assert saved.pad_token != saved.eos_token


def test_the_manifest_tells_what_made_the_model(lora_job):
    manifest = lora_job.manifest
    assert manifest["settings"]["learning_rate"] == 0.01
    assert manifest["data"]["train"]["num_rows"] == 32
    assert manifest["data"]["train"]["files"][0]["sha256"]
    assert manifest["num_steps"] == 4
    assert manifest["metrics"]["eval_loss"] == pytest.approx(
        metrics_of(lora_job.result.stdout, "eval_loss")[-1], rel=1e-4
    )
    assert manifest["versions"]["trl"]
    assert list(manifest["phase_seconds"]) == [*PHASES, "proof"]


def test_the_journal_holds_what_the_job_measured(lora_job):
    records = lora_job.read_journal()
    log, manifest = lora_job.result.stdout, lora_job.manifest
    lines = [record for record in records if record["kind"] == "metrics"]
    for key in ("train_loss", "eval_loss", "tokens_per_second", "seconds_per_step", "memory_gib"):
        values = [record["values"][key] for record in lines if key in record["values"]]
        assert values == pytest.approx(metrics_of(log, key), rel=1e-5)
    assert [(record["step"], record["total_steps"]) for record in lines] == [(1, 4), (2, 4), (3, 4), (4, 4), (4, 4)]
    of_one, of_all = (metrics_of(log, f"tokens_per_second{suffix}") for suffix in ("_per_device", ""))
    assert of_one == of_all
    phases = [record for record in records if record["kind"] == "phase"]
    assert {phase["name"]: phase["seconds"] for phase in phases} == manifest["phase_seconds"]
    for phase, following in pairwise(phases):  # they share out the job's time
        assert following["time"] - following["seconds"] == pytest.approx(phase["time"], abs=0.05)
    assert {record["step"] for record in records if record["kind"] == "checkpoint"} >= set(lora_job.checkpoints)
    train, validation = (record for record in records if record["kind"] == "data")
    assert (train["split"], train["rows"], sum(train["lengths"].values())) == ("train", 32, 32)
    assert (validation["split"], validation["rows"]) == ("validation", 4)
    (source,) = train["sources"]
    assert source["uri"] == (lora_job.base_dir / "input/data/train/train.jsonl").as_uri()
    assert source["sha256"] == manifest["data"]["train"]["files"][0]["sha256"]
    (model,) = (record for record in records if record["kind"] == "model")
    assert model["trainable_parameters"] == manifest["trainable_parameters"]
    (entered,) = (record for record in records if record["kind"] == "manifest")
    assert manifest.items() <= entered.items()


def test_every_record_of_a_job_has_the_fields_of_its_type(lora_job):
    records = [record for record, _ in read_records(lora_job.base_dir / "output/data/metrics.jsonl")]
    others = {"event", "completions"}  # of attempts after the first, and of methods whose model writes
    assert {record["kind"] for record in records} >= KINDS - others
    for record in records:
        assert record.keys() <= list_fields(record["kind"])
    assert records[0]["schema_version"] == lora_job.manifest["schema_version"] == SCHEMA_VERSION


def test_the_journal_holds_answers_to_held_out_prompts_before_and_after(lora_job):
    answers = [record for record in lora_job.read_journal() if record["kind"] == "generation"]
    assert [answer["split"] for answer in answers] == ["validation"] * 3
    assert [answer["reference"] for answer in answers] == ["0", "1", "2"]
    assert answers[0]["prompt"].endswith("What is 0 plus 0?<|im_end|>\n<|im_start|>assistant\n")
    assert all(answer["before"].endswith("…") for answer in answers)  # of random weights, which do not stop
    assert all(answer["after"] != answer["before"] for answer in answers)


def test_the_progress_is_told_at_the_end_and_read_as_no_metric(lora_job):
    lines = [line for line in lora_job.result.stdout.splitlines() if line.startswith("Progress: ")]
    assert len(lines) == 1
    assert re.fullmatch(r"Progress: step 4 of 4 \(100 %\); [\d.e-]+ s a step; \d\.\d\d instance-hours so far", lines[0])
    assert not any(re.search(definition["Regex"], lines[0]) for definition in define_metrics())
    assert "\r" not in lora_job.result.stdout


def test_secrets_are_in_no_file_and_no_log(lora_job):
    texts = [lora_job.result.stdout, *(file.read_text() for file in (lora_job.base_dir / "model").glob("*.json"))]
    assert not any("hf_secret" in text for text in texts)
    assert lora_job.manifest["settings"]["token"] == "***"
    assert lora_job.result.stdout.count("can read token: give it in the job's Environment") == 1


def test_packages_that_are_not_used_are_not_imported(lora_job):
    imported = set((lora_job.base_dir / "imports").read_text().split())
    assert "torch" in imported
    assert not imported & {"mlflow", "wandb", "bitsandbytes", "scipy"}


@pytest.fixture(scope="module")
def merged_job(make_tree):
    """A finished job of a YAML channel, text rows and the command line, which merges and keeps no checkpoints."""
    tree = make_tree()
    config = "learning_rate: 1e-2\nlora_r: 2\nmax_steps: 2\nlogging_steps: 1\nmerge_weights: true\n"
    tree.write("input/data/config/args.yaml", f"{config}use_checkpoints: false\n")
    tree.write("input/config/hyperparameters.json", {})
    tree.write("input/data/train/train.jsonl", "".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(8)))
    tree.result = tree.run("--lora_alpha=4", "--per_device_train_batch_size", "4")
    return tree


def test_a_yaml_channel_text_rows_and_the_command_line(merged_job):
    assert merged_job.result.returncode == 0, merged_job.result.stdout
    config = json.loads((merged_job.base_dir / "model/adapter/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert len(metrics_of(merged_job.result.stdout, "train_loss")) == 2


def test_without_checkpoints_none_is_written(merged_job):
    assert merged_job.result.returncode == 0, merged_job.result.stdout
    assert not merged_job.checkpoints


def test_merged_weights_compute_what_the_adapter_does_on_the_base(merged_job):
    assert merged_job.result.returncode == 0, merged_job.result.stdout
    check_merge(merged_job)


@pytest.mark.long
def test_merged_weights_of_a_quantized_job_compute_what_the_adapter_does_on_the_base(tree):
    tree.change(merge_weights="true", load_in_4bit="true")
    result = tree.run()
    assert result.returncode == 0, result.stdout
    check_merge(tree)


def check_merge(tree):
    """Compare the merged weights of a finished job with its adapter on the base."""
    assert {"config.json", "model.safetensors", "training_manifest.json"} | TOKENIZER_FILES <= tree.model_files
    assert not ADAPTER_FILES & tree.model_files
    base = AutoModelForCausalLM.from_pretrained(tree.base_dir / "input/data/model")
    trained = logits_of(PeftModel.from_pretrained(base, tree.base_dir / "model/adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tree.base_dir / "model")
    assert merged.dtype == torch.float32
    torch.testing.assert_close(logits_of(merged), trained, rtol=1e-3, atol=1e-4)
    assert tree.manifest["export"]["checks"][1]["relative_logit_difference"] < 1e-4


@pytest.fixture(scope="module")
def full_job(make_tree):
    """A finished job that trains all weights, and reports to MLflow."""
    tree = make_tree()
    tree.uri = f"sqlite:///{tree.base_dir}/mlflow.db"
    tree.change(use_peft="false", torch_dtype="bfloat16")
    tree.change(mlflow_uri=tree.uri, mlflow_experiment_name="trial", hub_token="hf_secret")
    tree.result = tree.run()
    return tree


def test_full_fine_tuning_writes_whole_weights_in_the_asked_type(full_job):
    assert full_job.result.returncode == 0, full_job.result.stdout
    model = AutoModelForCausalLM.from_pretrained(full_job.base_dir / "model")
    assert model.dtype == torch.bfloat16
    assert not ADAPTER_FILES & full_job.model_files


def test_mlflow_switches_itself_on_and_learns_no_secret(full_job):
    from mlflow.tracking import MlflowClient

    assert full_job.result.returncode == 0, full_job.result.stdout
    client = MlflowClient(full_job.uri)
    (run,) = client.search_runs([client.get_experiment_by_name("trial").experiment_id])
    assert run.data.metrics["train_loss"] > 0
    assert "hf_secret" not in (full_job.base_dir / "mlflow.db").read_bytes().decode("latin-1")


def test_two_ranks_train_as_one_with_twice_the_accumulation(lora_job, tree):
    tree.change(per_device_train_batch_size="4", nproc_per_node="2")
    result = tree.run()
    assert result.returncode == 0, result.stdout
    losses = metrics_of(result.stdout, "train_loss")
    assert len(losses) == 4
    assert losses == pytest.approx(metrics_of(lora_job.result.stdout, "train_loss"), rel=1e-4)
    assert metrics_of(result.stdout, "eval_loss") == pytest.approx(
        metrics_of(lora_job.result.stdout, "eval_loss"), rel=1e-4
    )


@pytest.mark.long
def test_a_longer_run_goes_on_and_its_result_replaces_the_first_ones(tree):
    assert tree.run().returncode == 0
    kept = tree.write("model/mine.txt", "not the job's")
    tree.change(num_train_epochs="2", early_stopping="true", save_total_limit="1", merge_weights="true")
    result = tree.run()
    assert result.returncode == 0, result.stdout
    assert metrics_of(result.stdout, "step")[0] == 5
    assert tree.manifest["num_steps"] == 8
    assert tree.checkpoints == [8]
    assert not ADAPTER_FILES & tree.model_files
    assert "model.safetensors" in tree.model_files
    assert kept.exists()
