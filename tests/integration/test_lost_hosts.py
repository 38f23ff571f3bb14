# SPDX-License-Identifier: Apache-2.0
"""A job that loses a host goes on with the others. Three addresses of the loopback interface stand for the hosts."""

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.long

HOSTS = ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
TOLERANCE = 1e-5  # float32, and sums in another order
HYPERPARAMETERS = {
    "global_batch_size": "12",
    "num_train_epochs": "4",
    "per_device_train_batch_size": None,
    "save_steps": "1",
    "lora_dropout": "0",
    "adam_epsilon": "1e-6",
}
ELASTIC = {"min_hosts": "2", "max_restarts": "2", "host_timeout_seconds": "20"}


@pytest.fixture
def make_three(make_hosts, tmp_path):
    """The trees of three hosts, which share the folder of checkpoints unless `shared` is false."""

    def make(shared=True, **hyperparameters):
        folder = {"checkpoint_dir": str(tmp_path / "checkpoints")} if shared else {}
        return make_hosts(HOSTS, **{**HYPERPARAMETERS, **ELASTIC, **folder, **hyperparameters})

    return make


@pytest.fixture(scope="module")
def alone(make_tree):
    """The adapter of the same job in one process."""
    tree = make_tree()
    tree.environment["OMP_NUM_THREADS"] = "1"
    tree.change(**HYPERPARAMETERS)
    assert tree.run().returncode == 0
    return load_file(tree.base_dir / "model/adapter_model.safetensors")


def job_records(tree):
    return [record for record in tree.read_journal() if record["kind"] == "job"]


@pytest.mark.parametrize("killed", [0, 1, 2])
def test_two_hosts_go_on_without_the_third(make_three, start, alone, killed):
    trees = make_three()
    jobs = [start(tree) for tree in trees]
    jobs[0].wait_for("step=2;")
    jobs[killed].process.kill()
    left = [number for number in range(3) if number != killed]
    for number in left:
        assert jobs[number].end() == 0, "\nNEXT HOST\n".join(job.log for job in jobs)
        assert "Attempt 2: the workers start again from the newest checkpoint." in jobs[number].log
    first = left[0]
    assert f"Host {HOSTS[killed]} no longer answers" in jobs[first].log
    assert f"2 of 3 hosts train, without {HOSTS[killed]}." in jobs[first].log or killed == 0
    last = job_records(trees[first])[-1]
    assert (last["attempt"], last["world_size"], last["hosts"]) == (2, 2, [HOSTS[number] for number in left])
    assert "Resuming from" in jobs[first].log
    assert trees[first].manifest["num_steps"] == 12
    for name, tensor in load_file(trees[first].base_dir / "model/adapter_model.safetensors").items():
        assert (tensor - alone[name]).abs().max() < TOLERANCE
    assert not trees[left[1]].model_files


@pytest.mark.parametrize(
    ("killed", "waiting", "words"),
    [(2, 0, "another host in the place of a lost one."), (0, 1, "another one in its place.")],
)
def test_another_host_in_the_place_of_a_lost_one_trains_with_the_others(make_three, start, killed, waiting, words):
    """One in the place of the first host leads again."""
    trees = make_three(host_timeout_seconds="100")
    jobs = [start(tree) for tree in trees]
    jobs[0].wait_for("step=2;")
    jobs[killed].process.kill()
    jobs[waiting].wait_for(f"Waiting 100 s at most for {words}")
    jobs[killed] = start(trees[killed])
    for job in jobs:
        assert job.end() == 0, job.log
        assert "Attempt 2: the workers start again from the newest checkpoint." in job.log
    assert [(job["attempt"], job["world_size"]) for job in job_records(trees[0])] == [(1, 3), (2, 3)]


@pytest.mark.parametrize(("replaced", "differing"), [(0, 1), (2, 0)])
def test_another_host_with_other_settings_is_refused_and_the_others_go_on(make_three, start, replaced, differing):
    trees = make_three()
    jobs = [start(tree) for tree in trees]
    jobs[0].wait_for("step=2;")
    jobs[replaced].process.kill()
    jobs[1].wait_for(f"Host {HOSTS[replaced]} no longer answers") if replaced == 0 else jobs[0].wait_for("Waiting 20 s")
    trees[replaced].change(learning_rate="0.5")
    stranger = start(trees[replaced])
    assert stranger.end() == 1
    assert (
        f"Host {HOSTS[differing]} differs from {HOSTS[replaced]} in learning_rate (0.5 on " in trees[replaced].failure
    )
    jobs.pop(replaced)
    for job in jobs:
        assert job.end() == 0, job.log
    assert "differs from" in jobs[0].log
    assert "It has no part in this job." in jobs[0].log


def test_too_few_hosts_end_with_a_sentence(make_three, start):
    trees = make_three(min_hosts="3", host_timeout_seconds="5")
    jobs = [start(tree) for tree in trees]
    jobs[0].wait_for("step=2;")
    jobs[1].process.kill()
    for number in (0, 2):
        assert jobs[number].end() == 1
        assert trees[number].failure == (
            "Host 127.0.0.2 no longer answers: its container was killed or its machine failed. No other came in its "
            "place within 5 s, and the job needs 3 hosts. Start the job again; it goes on from the newest checkpoint."
        )


def test_a_checkpoint_that_was_lost_with_its_host_is_not_replaced_by_a_new_beginning(make_three, start):
    trees = make_three(shared=False, host_timeout_seconds="5")
    jobs = [start(tree) for tree in trees]
    jobs[0].wait_for("step=3;")
    jobs[0].process.kill()
    for number in (1, 2):
        assert jobs[number].end() == 1, jobs[number].log
        assert trees[number].failure.startswith("The checkpoints of this job are gone: no whole one is in ")


def test_two_hosts_begin_without_the_one_that_never_came(make_three, start):
    trees = make_three(host_timeout_seconds="5")
    jobs = [start(tree) for tree in trees[:2]]
    for job in jobs:
        assert job.end() == 0, job.log
    assert "Host 127.0.0.3 did not come within 5 s: the others begin." in jobs[0].log
    assert [record["world_size"] for record in job_records(trees[0])] == [2]
