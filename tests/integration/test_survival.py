# SPDX-License-Identifier: Apache-2.0
"""A job that is stopped, killed and started again ends as if nothing had happened. Real processes and signals."""

import json
import os
import shutil
import signal

import psutil
import pytest
from safetensors.torch import load_file

from llm_trainer.job.checkpoint_lock import find_other_job
from support.fake_hub import MODEL, FakeHub
from support.holding import hold_function
from support.sagemaker_tree import ROWS, metrics_of
from support.waiting import wait_until

# Eight steps in two epochs, with dropout and accumulation. One thread: the order of sums is part of a result.
pytestmark = pytest.mark.long

HYPERPARAMETERS = {
    "num_train_epochs": "2",
    "per_device_train_batch_size": "4",
    "gradient_accumulation_steps": "2",
    "lora_dropout": "0.3",
    "save_steps": "1",
    "save_total_limit": "99",
}


def adapter_of(tree):
    return {
        name: tensor.tolist() for name, tensor in load_file(tree.base_dir / "model/adapter_model.safetensors").items()
    }


def run(tree):
    result = tree.run()
    assert result.returncode == 0, result.stdout
    assert not (tree.base_dir / "output/failure").exists()
    return result.stdout


@pytest.fixture(scope="module")
def make_job(make_tree):
    def make(**hyperparameters):
        tree = make_tree()
        tree.environment["OMP_NUM_THREADS"] = "1"
        tree.change(**{**HYPERPARAMETERS, **hyperparameters})
        return tree

    return make


ORDERS = {
    "grouped": {"train_sampling_strategy": "group_by_length"},
    "packed": {"packing": "true", "max_length": "50", "per_device_train_batch_size": "2"},
}


@pytest.fixture(scope="module", params=list(ORDERS))
def finished(request, make_job):
    """A job that nothing interrupted, and all of its checkpoints."""
    tree = make_job(**ORDERS[request.param])
    run(tree)
    return tree


def steps_an_epoch(tree):
    return tree.manifest["num_steps"] // 2


@pytest.mark.parametrize("steps_into_the_second_epoch", [1, 0], ids=["within-an-epoch", "between-two"])
def test_a_resumed_run_ends_with_the_very_same_weights(finished, make_job, steps_into_the_second_epoch):
    step = steps_an_epoch(finished) + steps_into_the_second_epoch
    tree = make_job()
    shutil.copy(finished.base_dir / "input/config/hyperparameters.json", tree.base_dir / "input/config")
    folder = tree.base_dir / "synchronized"
    tree.write("input/config/checkpointconfig.json", {"S3Uri": "s3://bucket/prefix", "LocalPath": str(folder)})
    for number in (step, step + 1):
        shutil.copytree(finished.base_dir / f"checkpoints/checkpoint-{number}", folder / f"checkpoint-{number}")
    cut_short = folder / f"checkpoint-{step + 1}/optimizer.pt"
    cut_short.write_bytes(cut_short.read_bytes()[:1000])
    log = run(tree)
    assert f"Warning: {cut_short.parent} is left out, optimizer.pt has 1000 of" in log
    assert f"Resuming from {folder}/checkpoint-{step}" in log
    assert metrics_of(log, "step")[0] == step + 1
    assert adapter_of(tree) == adapter_of(finished)
    assert tree.manifest["metrics"]["eval_loss"] == finished.manifest["metrics"]["eval_loss"]
    assert not (tree.base_dir / "checkpoints").exists()


TWO_RANKS = {"nproc_per_node": "2", "num_train_epochs": "20", "save_total_limit": None}


@pytest.fixture(scope="module")
def finished_by_two_ranks(make_job):
    tree = make_job(**TWO_RANKS, use_checkpoints="false")
    run(tree)
    return tree


def test_a_stop_with_two_ranks_saves_and_exports_and_the_next_start_goes_on(finished_by_two_ranks, make_job, start):
    stopped = make_job(**TWO_RANKS, save_steps=None)
    job = start(stopped)
    job.wait_for("step=5;")
    job.process.send_signal(signal.SIGTERM)
    job.wait_for("Received SIGTERM")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0, job.log
    assert job.log.count("Received SIGTERM: after this step, save a checkpoint, export and end.") == 1
    assert "all ranks agreed" in job.log
    assert "All processes ended" in job.log
    manifest = stopped.manifest
    assert manifest["stopped"]
    assert stopped.checkpoints[-1] == manifest["num_steps"]
    assert 5 <= manifest["num_steps"] < manifest["total_steps"]
    assert "adapter_model.safetensors" in stopped.model_files
    assert not (stopped.base_dir / "output/failure").exists()
    run(stopped)
    assert stopped.manifest["num_steps"] == finished_by_two_ranks.manifest["num_steps"]
    assert adapter_of(stopped) == adapter_of(finished_by_two_ranks)


def read_files(folder):
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(("num_ranks", "is_second_run"), [("1", True), ("2", False)])
def test_a_stop_while_rows_are_tokenized_ends_the_job_and_changes_nothing(make_job, start, num_ranks, is_second_run):
    tree = make_job(nproc_per_node=num_ranks, num_train_epochs="1")
    if is_second_run:
        run(tree)
    earlier = [read_files(tree.base_dir / folder) for folder in ("model", "checkpoints")]
    tree.write("input/data/train/train.jsonl", "")
    tree.give_many_rows()
    job = start(tree)
    tree.wait_for_tokens()
    processes = psutil.Process(job.process.pid).children(recursive=True)
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0, job.log
    stays = f", and checkpoint-{tree.checkpoints[-1]} stays for the next start" if is_second_run else ""
    assert f"Stopped before the training began: there is nothing to save{stays}.\nAll processes ended " in job.log
    assert not any(process.is_running() for process in processes)
    assert [read_files(tree.base_dir / folder) for folder in ("model", "checkpoints")] == earlier
    assert tree.read_journal()[-1]["status"] == "stopped"
    assert not (tree.base_dir / "output/failure").exists()


def test_a_run_ends_by_itself_before_its_time_is_over(make_job):
    tree = make_job(num_train_epochs="100000", MaxRuntimeInSeconds="12", merge_weights="true", save_steps="100000")
    log = run(tree)
    assert "Stopped after step" in log
    assert tree.manifest["stopped"]
    # On a busy machine the time is over in the first step, which a stop within it leaves undone.
    assert len(tree.checkpoints) == min(1, tree.manifest["num_steps"])
    assert "adapter_model.safetensors" in tree.model_files  # a merge may take longer than there is time


@pytest.mark.parametrize("step", [2, 4], ids=["in-the-middle", "after-the-last-step"])
def test_a_stop_during_evaluation_does_not_wait_for_its_end(make_job, start, step):
    tree = make_job(num_train_epochs="1", per_device_eval_batch_size="1", eval_steps=str(step))
    row = json.dumps(
        {"messages": [{"role": "user", "content": "x" * 200}, {"role": "assistant", "content": "y" * 200}]}
    )
    tree.write("input/data/validation/validation.json", f"{row}\n" * 6000)
    job = start(tree)
    job.wait_for(f"step={step};")  # the evaluation comes next
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0, job.log
    assert tree.checkpoints[-1] == tree.manifest["num_steps"] == step
    assert not tree.manifest["export"]["proven"]
    marker = json.loads((tree.base_dir / f"checkpoints/checkpoint-{step}/complete.json").read_text())
    assert marker["evaluation_due"]
    tree.write("input/data/validation/validation.json", f"{row}\n" * 2)
    log = run(tree)
    assert metrics_of(log, "step")[0] == step  # the evaluation that was put off comes first
    assert "eval_loss" in log.split("train_loss")[0]


# Phases after the training, each by a function of it, and what is left out of the job then.
PROOF, ANSWERS = "the comparison with the trained model", "the answers after the training"
HELD = {
    "answers": ("llm_trainer.training.sample_answers:SampleAnswers.ask", (ANSWERS, PROOF, "the merge")),
    "proof": ("llm_trainer.export.verify:compare_logits", (PROOF, "the merge")),
    "merge": ("llm_trainer.export.export:write_merged_model", ("the merge",)),
}
PUSH = "llm_trainer.export.publish:push_to_hub"


@pytest.mark.parametrize("phase", list(HELD))
def test_a_stop_after_the_training_breaks_off_what_the_result_can_do_without(make_job, start, tmp_path, phase):
    function, left_out = HELD[phase]
    tree = make_job(num_train_epochs="1", merge_weights="true", sample_prompts="1")
    tree.environment |= hold_function(tmp_path / "held", os.environ.get("PYTHONPATH", ""), function)
    job = start(tree)
    job.wait_for("HOLDING")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0, job.log
    told = [f"Left out, since the job was stopped: {what}." for what in left_out]
    assert [line for line in job.log.splitlines() if "Left out" in line] == [f"Warning: {text}" for text in told]
    assert not (tree.base_dir / "output/failure").exists()
    folder = tree.base_dir / "model/adapter"
    assert load_file(folder / "adapter_model.safetensors")
    assert not {file.name for file in (tree.base_dir / "model").iterdir()} - {"adapter"}
    manifest = json.loads((folder / "training_manifest.json").read_text())
    assert manifest["stopped"]
    assert manifest["num_steps"] == manifest["total_steps"]
    assert (manifest["export"]["proven"], manifest["export"]["left_out"]) == (phase == "merge", told)
    card, report = (folder / "README.md").read_text(), (tree.base_dir / "output/data/report.html").read_text()
    for text in (card, report):
        assert ("the job was stopped before the comparison" in text) == (phase != "merge")
    records = tree.read_journal()
    assert [record["text"] for record in records if record["kind"] == "event"] == told
    assert records[-1]["status"] == "stopped"


def test_a_stop_breaks_off_the_push_of_a_result(make_job, start, tmp_path, tiny_model):
    hub = FakeHub(tiny_model)
    tree = make_job(num_train_epochs="1", push_to_hub="true", hub_model_id=MODEL)
    tree.environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    tree.environment |= hold_function(tmp_path / "held", os.environ.get("PYTHONPATH", ""), PUSH)
    job = start(tree)
    job.wait_for("HOLDING")
    job.process.send_signal(signal.SIGTERM)
    assert job.end() == 0, job.log
    told = f"Left out, since the job was stopped: publishing {tree.base_dir / 'model'}."
    assert f"Warning: {told}" in job.log
    assert tree.manifest["export"]["proven"]
    assert (tree.manifest["stopped"], tree.manifest["export"]["left_out"]) == (True, [told])
    assert "adapter_model.safetensors" in tree.model_files
    assert not hub.commits


def test_a_killed_worker_is_replaced_and_goes_on(make_job, start):
    """That it ends with the same weights is tested with two hosts."""
    killed = make_job(num_train_epochs="20", save_steps="5", max_restarts="1")
    job = start(killed)
    job.wait_for("step=10;")
    job.workers()[0].kill()
    assert job.end() == 0, job.log
    assert "Attempt 2: the workers start again from the newest checkpoint." in job.log
    assert "Resuming from" in job.log
    assert not (killed.base_dir / "output/failure").exists()
    assert killed.manifest["num_steps"] == killed.manifest["total_steps"]
    phases, records = killed.manifest["phase_seconds"], killed.read_journal()
    assert list(phases)[:4] == ["check", "meeting", "attempt_1", "launch"]
    _, again = (record["time"] for record in records if record["kind"] == "job")
    _, launch = (record for record in records if record["kind"] == "phase" and record["name"] == "launch")
    trained_until = max(record["time"] for record in records if record["kind"] == "metrics" and record["time"] < again)
    began = launch["time"] - launch["seconds"]
    assert trained_until < began < again + 0.1  # as the seconds of the phases before are rounded


def test_a_launcher_keeps_its_checkpoint_folder_to_itself_and_takes_every_process_along(make_job, start):
    tree = make_job(num_train_epochs="100000")
    job = start(tree)
    job.wait_for("step=2;")
    workers = job.workers()
    folder = tree.base_dir / "checkpoints"
    second = make_job(checkpoint_dir=str(folder))
    assert second.run().returncode == 1
    assert second.failure.startswith(f"checkpoint_dir='{folder}' is in use by another job (host algo-1, process ")
    job.process.kill()
    job.process.wait()
    assert find_other_job(folder) is None
    wait_until(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers))


@pytest.mark.parametrize("num_ranks", ["1", "2"])
def test_a_launcher_killed_early_leaves_nothing_that_would_train(make_job, start, num_ranks):
    """torchrun and a worker import torch for seconds before they can do anything about their end."""
    tree = make_job(num_train_epochs="100000", nproc_per_node=num_ranks)
    job = start(tree)
    job.wait_for("Training data: ")
    launcher = psutil.Process(job.process.pid)
    wait_until(lambda: len(launcher.children()) == 2)  # the reporter, and what starts the workers
    children = launcher.children(recursive=True)
    job.process.kill()
    job.process.wait()
    wait_until(lambda: not any(child.is_running() and child.status() != "zombie" for child in children))


STREAMING = {"streaming": "true", "max_steps": "12", "nproc_per_node": "2", "save_steps": "6"}


@pytest.fixture(scope="module")
def make_streaming_job(make_job):
    def make(**hyperparameters):
        tree = make_job(**STREAMING, **hyperparameters)
        for number, num_rows in enumerate((150, 3)):  # three chunks for two ranks, again and again
            rows = [ROWS[(7 * row + number) % len(ROWS)] for row in range(num_rows)]
            tree.write(f"input/data/train/{number}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
        (tree.base_dir / "input/data/train/train.jsonl").unlink()
        return tree

    return make


def test_a_stream_ends_after_its_steps_and_resumes_to_the_very_same_weights(make_streaming_job):
    finished, resumed = make_streaming_job(learning_rate="0.03"), make_streaming_job(learning_rate="0.03")
    log = run(finished)
    losses = metrics_of(log, "train_loss")
    assert len(losses) == finished.manifest["num_steps"] == 12
    assert losses[-1] < losses[0]
    assert finished.manifest["metrics"]["eval_loss"] > 0
    shutil.copytree(finished.base_dir / "checkpoints/checkpoint-6", resumed.base_dir / "checkpoints/checkpoint-6")
    log = run(resumed)
    assert metrics_of(log, "step")[0] == 7
    assert adapter_of(resumed) == adapter_of(finished)
