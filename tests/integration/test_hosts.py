# SPDX-License-Identifier: Apache-2.0
"""One job on several hosts. Here two addresses of the loopback interface stand for them; tests/image has containers."""

import json
import os
import signal

import pytest
from safetensors.torch import load_file

from llm_trainer.host.gpu_metrics import GPU_METRICS
from llm_trainer.journal.journal import read_records
from support.holding import hold_function
from support.sagemaker_tree import HOSTS, ROWS
from support.waiting import wait_until

pytestmark = pytest.mark.long


def adapter_of(tree):
    return load_file(tree.base_dir / "model/adapter_model.safetensors")


def test_a_killed_worker_of_one_host_is_replaced_and_all_end_with_one_adapter(make_hosts, make_tree, start):
    first, second = make_hosts(num_train_epochs="20", logging_steps="10", save_steps="5", max_restarts="1")
    jobs = [start(tree) for tree in (first, second)]
    jobs[0].wait_for("step=10;")
    jobs[1].workers()[0].kill()
    for job, other in zip(jobs, reversed(jobs), strict=True):
        assert job.end() == 0, job.log + "OTHER HOST\n" + other.log
        assert "Attempt 2: the workers start again from the newest checkpoint." in job.log
    assert "Rank 1 on host 127.0.0.2 was killed by signal 9" in jobs[0].log
    assert "adapter_model.safetensors" in first.model_files
    assert not second.model_files
    journal = first.base_dir / "output/data/metrics.jsonl"
    assert [job["attempt"] for job in records(journal, "job")] == [1, 2]
    assert [event["text"].split(",")[0] for event in records(journal, "event")] == [
        "Rank 1 on host 127.0.0.2 was killed by signal 9"
    ]
    assert [end["status"] for end in records(journal, "end")] == ["done"]
    # The same job with its two ranks on one host, never interrupted.
    alone = make_tree()
    alone.environment["OMP_NUM_THREADS"] = "1"
    alone.change(per_device_train_batch_size="4", num_train_epochs="20", nproc_per_node="2")
    assert alone.run().returncode == 0
    for name, tensor in adapter_of(alone).items():
        assert tensor.equal(adapter_of(first)[name])


def test_gpus_of_all_hosts_come_into_one_journal_and_their_xids_into_the_reason(make_hosts, start, fake_nvml, tmp_path):
    trees = make_hosts(num_train_epochs="10000", use_cpu="true")
    for tree in trees:
        tree.environment |= {**fake_nvml(gpus=8), "FAKE_NVML_STATE": str(tmp_path / tree.base_dir.name)}
    journal = trees[0].base_dir / "output/data/metrics.jsonl"
    jobs = [start(tree) for tree in trees]
    jobs[0].wait_for("step=2;")
    (tmp_path / trees[1].base_dir.name).write_text("xid 3 79\n")
    # Of both hosts the second sample, which alone has what is measured between two.
    wanted = {f"gpu/{host}/{index}/{metric}" for host in HOSTS for index in range(8) for metric in GPU_METRICS}
    wanted |= {f"host/{host}/cpu_percent" for host in HOSTS}
    wait_until(lambda: wanted <= {name for record in records(journal, "system") for name in record["values"]})
    wait_until(lambda: records(journal, "event"))
    jobs[1].workers()[0].kill()
    for job, tree in zip(jobs, trees, strict=True):
        assert job.end() == 1
        assert tree.failure.startswith("Rank 1 on host 127.0.0.2 was killed by signal 9")
        assert "GPU 3 of 127.0.0.2 reported XID 79: the GPU has fallen off the bus" in tree.failure
    assert "Warning: GPU 3 of 127.0.0.2 reported XID 79" in jobs[1].log
    (event,) = records(journal, "event")
    assert (event["host"], event["level"]) == ("127.0.0.2", "warning")
    (job,) = records(journal, "job")
    assert (job["hosts"], job["world_size"], job["attempt"]) == (HOSTS, 2, 1)
    assert job["environment"]["gpus"] == ["NVIDIA Fake 24GB"] * 8
    assert [phase["name"] for phase in records(journal, "phase")][:2] == ["check", "meeting"]
    (end,) = records(journal, "end")
    assert (end["status"], end["reason"]) == ("failed", trees[0].failure)
    assert next(read_records(journal))[0] == job
    assert not (trees[1].base_dir / "output/data/metrics.jsonl").exists()


def records(journal, kind):
    return [record for record, _ in read_records(journal) if record["kind"] == kind]


@pytest.mark.parametrize(
    ("hanging", "function", "place"),
    [
        (0, "llm_trainer.training.resumable:ResumableMixin._save_checkpoint", "all_gather, collective "),
        (1, "torch.utils.data.dataloader:_BaseDataLoaderIter.__next__", "all_gather, collective "),
        (1, "llm_trainer.training.trainer_config:join_cpu_ranks", "the meeting of all ranks at the start, "),
    ],
)
def test_a_rank_that_hangs_is_named_with_its_host_on_every_host(make_hosts, start, tmp_path, hanging, function, place):
    trees = make_hosts(ddp_timeout="5", save_steps="2")
    python_path = os.environ.get("PYTHONPATH", "")
    trees[hanging].environment |= hold_function(tmp_path / "held", python_path, function)
    jobs = [start(tree) for tree in trees]
    for job, tree in zip(jobs, trees, strict=True):
        assert job.end() == 1
        assert tree.failure.startswith(f"Rank {hanging} on host {HOSTS[hanging]} did not come to {place}"), job.log


def test_the_loss_of_the_first_host_ends_the_others_with_its_name(make_hosts, start):
    trees = make_hosts(num_train_epochs="10000", max_restarts="1")
    jobs = [start(tree) for tree in trees]
    jobs[0].wait_for("step=2;")
    jobs[0].process.kill()
    assert jobs[1].end() == 1
    assert trees[1].failure.startswith("Host 127.0.0.1 no longer answers: its container was killed")


def test_a_stop_of_one_host_stops_all_after_the_same_step(make_hosts, start):
    first, second = make_hosts(num_train_epochs="10000")
    jobs = [start(tree) for tree in (first, second)]
    jobs[0].wait_for("step=2;")
    jobs[1].process.send_signal(signal.SIGTERM)
    for job in jobs:
        assert job.end() == 0, job.log
    assert first.manifest["stopped"]
    assert [end["status"] for end in records(first.base_dir / "output/data/metrics.jsonl", "end")] == ["stopped"]
    assert first.checkpoints[-1] == first.manifest["num_steps"]
    assert not second.checkpoints


def test_a_stop_of_the_other_host_breaks_off_the_first_ones_proof(make_hosts, start, tmp_path):
    first, second = make_hosts()
    function = "llm_trainer.export.verify:compare_logits"
    first.environment |= hold_function(tmp_path / "held", os.environ.get("PYTHONPATH", ""), function)
    jobs = [start(tree) for tree in (first, second)]
    jobs[0].wait_for("HOLDING")
    jobs[1].process.send_signal(signal.SIGTERM)
    for job in jobs:
        assert job.end() == 0, job.log
    assert "Host 127.0.0.2 got a stop signal: this host stops, too.\n" in jobs[0].log
    assert first.manifest["export"]["left_out"] == [
        "Left out, since the job was stopped: the comparison with the trained model."
    ]


@pytest.mark.parametrize("signalled", [0, 1])
def test_a_stop_of_one_host_while_rows_are_tokenized_ends_all(make_hosts, start, signalled):
    trees = make_hosts(max_restarts="1")
    for tree in trees:
        tree.give_many_rows()
        tree.write("input/data/train/train.jsonl", "")
    jobs = [start(tree) for tree in trees]
    trees[signalled].wait_for_tokens()
    jobs[signalled].process.send_signal(signal.SIGTERM)
    for job, tree in zip(jobs, trees, strict=True):
        assert job.end() == 0, job.log
        assert "Stopped before the training began: there is nothing to save.\n" in job.log
        assert not tree.model_files
        assert not (tree.base_dir / "output/failure").exists()


@pytest.mark.parametrize("present", [0, 1])
def test_a_host_that_never_comes_is_named(make_hosts, present):
    tree = make_hosts(host_timeout_seconds="3")[present]
    result = tree.run()
    assert result.returncode == 1
    assert tree.failure.startswith(f"Host {HOSTS[1 - present]} could not be reached from {HOSTS[present]} within 3 s")


def test_a_host_whose_name_is_unknown_is_named_with_the_reason(make_hosts):
    tree = make_hosts(["no-such-host.invalid", "127.0.0.2"], host_timeout_seconds="3")[1]
    assert tree.run().returncode == 1
    assert tree.failure.startswith("Host no-such-host.invalid could not be reached from 127.0.0.2 within 3 s (")


def test_one_hosts_mistake_ends_all_with_its_reason(make_hosts, start):
    first, second = make_hosts()
    second.change(lora_rnak="8")
    jobs = [start(tree) for tree in (first, second)]
    for job, tree in zip(jobs, (first, second), strict=True):
        assert job.end() == 1
        assert tree.failure.startswith("Hyperparameter 'lora_rnak' is not a setting")


def test_the_host_of_another_group_waits_for_those_that_train(make_hosts, start):
    groups = [
        {"instance_group_name": "data", "instance_type": "ml.c5.xlarge", "hosts": ["127.0.0.1"]},
        {"instance_group_name": "gpu", "instance_type": "ml.g5.xlarge", "hosts": ["127.0.0.2"]},
    ]
    waiting, training = make_hosts(groups=groups)
    waits = start(waiting)
    waits.wait_for("This host, 127.0.0.1, does not train: it waits for 127.0.0.2.")
    result = training.run()
    assert result.returncode == 0, result.stdout
    assert json.loads((training.base_dir / "model/training_manifest.json").read_text())["world_size"] == 1
    assert waits.end() == 0
    assert not waiting.model_files


@pytest.fixture
def make_shards(make_hosts):
    """Trees of two hosts, the first with 25 and the second with 7 of the rows, of which all are validated with."""

    def make():
        trees = make_hosts()
        for tree, rows in zip(trees, (ROWS[:25], ROWS[25:]), strict=True):
            channels = {"model": {}, "train": {"S3DistributionType": "ShardedByS3Key"}, "validation": {}}
            tree.write("input/config/inputdataconfig.json", channels)
            tree.write("input/data/train/train.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows))
        return trees

    return make


def test_hosts_with_uneven_shards_train_as_if_each_had_all_rows(make_shards, make_tree, start):
    trees = make_shards()
    jobs = [start(tree) for tree in trees]
    for job in jobs:
        assert job.end() == 0, job.log
    assert trees[0].manifest["data"]["train"]["num_rows"] == len(ROWS)
    alone = make_tree()
    alone.environment["OMP_NUM_THREADS"] = "1"
    alone.change(per_device_train_batch_size="4", nproc_per_node="2")
    assert alone.run().returncode == 0
    for name, tensor in adapter_of(alone).items():
        assert tensor.equal(adapter_of(trees[0])[name])


def test_a_bad_row_in_the_shard_of_one_host_is_told_by_all(make_shards, start):
    trees = make_shards()
    trees[1].write("input/data/train/worse.jsonl", '{"messages": 5}\n')
    for job in [start(tree) for tree in trees]:
        assert job.end() == 1
    for tree in trees:
        assert tree.failure.startswith("Host 127.0.0.2: worse.jsonl row 1 ")
    assert "worse.jsonl" in (trees[1].base_dir / "output/data/rejected_rows.jsonl").read_text()
