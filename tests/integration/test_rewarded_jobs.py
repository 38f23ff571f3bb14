# SPDX-License-Identifier: Apache-2.0
"""Jobs whose model writes what it is trained on: rewarded, stopped, resumed, spread over ranks, merged and proven."""

import json

import pytest

from llm_trainer.journal.journal import read_records
from support.compared_jobs import check_metrics_are_alike, check_stop_changes_nothing
from support.sagemaker_tree import finish, metrics_of, read_weights

PROMPTS = [{"question": f"What is {a} plus {b}?", "answer": a + b} for a in range(8) for b in range(4)]
LETTERS = """
def letters(completions, answer, **columns):
    assert all(type(each) is int for each in answer)
    return [sum("a" <= letter <= "z" for letter in each[-1]["content"]) / 8 for each in completions]

def answers(completions, answer, **columns):
    return answer
"""
SHARED = {
    "reward_functions": '["rewards.py:letters"]',
    "num_generations": "4",
    "max_completion_length": "8",
    "per_device_train_batch_size": "16",
    "sample_prompts": "0",
}
ALL_WEIGHTS = {"use_peft": "false", "beta": "0", "learning_rate": "0.05"}


@pytest.fixture
def make_job(make_tree):
    def make(method="grpo", **hyperparameters):
        tree = make_tree()
        tree.write("input/data/train/train.jsonl", "".join(f"{json.dumps(row)}\n" for row in PROMPTS))
        tree.write("input/data/validation/validation.json", PROMPTS[:3])
        tree.write("input/data/rewards/rewards.py", LETTERS)
        tree.change(method=method, **{**SHARED, **hyperparameters})
        return tree

    return make


@pytest.mark.parametrize("method", ["grpo", pytest.param("rloo", marks=pytest.mark.long)])
def test_a_job_earns_higher_rewards(make_job, method):
    tree = make_job(method, num_train_epochs="3", lr_scheduler_type="constant", **ALL_WEIGHTS)
    log = finish(tree)
    rewards = metrics_of(log, "reward")
    assert rewards[0] < 0.3
    assert sum(rewards[-4:]) / 4 > 0.7
    assert metrics_of(log, "eval_reward")[-1] > 0.7
    assert tree.manifest["export"]["proven"]
    journal = tree.base_dir / "output/data/metrics.jsonl"
    noted = [record for record, _ in read_records(journal) if record["kind"] == "completions"]
    assert len(noted) == len(rewards)
    assert noted[0]["completions"][0].keys() == {"prompt", "completion", "rewards", "advantage"}
    assert "What is" in noted[0]["completions"][0]["prompt"]


@pytest.mark.long
def test_an_adapter_is_merged_and_proven(make_job):
    tree = make_job(beta="0.1", merge_weights="true", max_steps="2")
    log = finish(tree)
    assert tree.manifest["export"]["proven"]
    kl = metrics_of(log, "kl")
    assert kl[0] == 0 < kl[1]


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": "2"},
        {"num_iterations": "2", "steps_per_generation": "4", "per_device_train_batch_size": "4"},
        {"method": "rloo", "gradient_accumulation_steps": "4", "per_device_train_batch_size": "4"},
        {"nproc_per_node": "2", "distribution": "fsdp", "per_device_train_batch_size": "4"},
    ],
    ids=["a generation a step", "several steps a generation", "rloo", "shards"],
)
def test_a_stopped_run_ends_with_the_same_weights(make_job, start, options):
    shared = {"save_steps": "1", **ALL_WEIGHTS, "learning_rate": "0.01", "method": "grpo", **options}
    whole, stopped = make_job(**shared), make_job(**shared)
    check_stop_changes_nothing(whole, stopped, start, step=3)


@pytest.mark.long
def test_other_rewards_are_another_run(make_job):
    tree = make_job(max_steps="1", save_steps="1", reward_options='{"rewards.py:letters": {"limit": 8}}')
    finish(tree)
    tree.write("input/data/rewards/rewards.py", f"{LETTERS}\n# changed\n")
    tree.change(max_steps="2", reward_options='{"rewards.py:letters": {"limit": 9}}', num_generations="2")
    assert tree.run().returncode == 1
    assert (
        "is a checkpoint of another run (num_generations was 4 and is 2; reward_functions was ['rewards.py:letters "
        in (tree.failure)
    )
    assert "reward_options was {'rewards.py:letters': {'limit': 8}} and is" in tree.failure


@pytest.mark.long
@pytest.mark.parametrize("victim", ["worker", "launcher"])
def test_a_killed_run_ends_with_the_same_weights(make_job, start, victim):
    several = {"num_iterations": "2", "steps_per_generation": "4", "per_device_train_batch_size": "4"}
    shared = {"save_steps": "1", "max_restarts": "1", **several, **ALL_WEIGHTS, "learning_rate": "0.01"}
    whole, killed = make_job(**shared), make_job(**shared)
    finish(whole)
    job = start(killed)
    job.wait_for("step=3")
    if victim == "worker":
        job.workers()[0].kill()
        assert job.end() == 0, job.log
        log = job.log
    else:
        job.process.kill()
        job.process.wait()
        log = finish(killed)
    assert "Resuming from" in log
    assert killed.manifest["num_steps"] == whole.manifest["num_steps"]
    assert read_weights(killed) == read_weights(whole)


@pytest.mark.long
def test_two_ranks_share_the_groups(make_job):
    """A group of four is written by two ranks, and rewarded as one. Of three prompts, none counts twice."""
    options = {"per_device_train_batch_size": "2", "reward_functions": '["rewards.py:letters", "rewards.py:answers"]'}
    log = finish(make_job(nproc_per_node="2", max_steps="4", **options, **ALL_WEIGHTS))
    assert len(metrics_of(log, "reward")) == 4
    assert set(metrics_of(log, "eval_rewards/answers/mean")) == {1}


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [ALL_WEIGHTS, {"beta": "0.1", "learning_rate": "0.01"}, {**ALL_WEIGHTS, "method": "rloo"}],
    ids=["full", "lora with a reference", "rloo"],
)
def test_shards_write_and_learn_what_copies_do(make_job, options):
    shared = {"per_device_train_batch_size": "8", "max_steps": "4", "nproc_per_node": "2", "method": "grpo", **options}
    jobs = [make_job(**shared, distribution=distribution) for distribution in ("ddp", "fsdp")]
    copies, shards = map(finish, jobs)
    keys = ("reward", "grad_norm", "completions/mean_length", "entropy", "eval_reward")
    check_metrics_are_alike(shards, copies, keys, rel=1e-4, abs=1e-5)
    assert jobs[1].manifest["export"]["proven"]


@pytest.mark.parametrize(
    ("code", "options", "sentence"),
    [
        pytest.param("    raise ValueError('no')\n", {}, "raised ValueError: no", marks=pytest.mark.long),
        ("    import time\n    time.sleep(1000)\n", {"reward_timeout_seconds": "1"}, "reward_timeout_seconds=1"),
    ],
    ids=["raises", "hangs"],
)
def test_a_reward_that_fails_ends_the_job(make_job, code, options, sentence):
    tree = make_job(max_steps="2", **options)
    tree.write("input/data/rewards/rewards.py", f"def letters(completions, **columns):\n{code}")
    result = tree.run()
    assert result.returncode == 1
    assert sentence in tree.failure


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"num_generations": "6"}, "num_generations=6 does not divide the 16 completions"),
        ({"reward_functions": '["exact_matsch"]'}, "the nearest is 'exact_match'"),
        ({"reward_functions": "[]"}, "reward_functions is empty"),
        ({"use_vllm": "true"}, "use_vllm=true and vllm is not installed"),
        ({"use_peft": "false", "beta": "0.1"}, "the reference would be a second model in memory"),
        (
            {"reward_functions": '["math"]', "reward_options": '{"math": {"column": "truth"}}'},
            "needs the column 'truth'",
        ),
        pytest.param({"per_device_train_batch_size": "256"}, "The train data has 32 prompts", marks=pytest.mark.long),
        ({"method": "dpo"}, "is a setting of method=grpo or rloo and this job has method=dpo"),
    ],
)
def test_what_cannot_work_is_told_before_the_weights_load(make_job, options, sentence):
    tree = make_job(**options)
    result = tree.run()
    assert result.returncode == 1
    assert sentence in tree.failure
    assert "model 1" not in result.stdout
