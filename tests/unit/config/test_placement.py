# SPDX-License-Identifier: Apache-2.0
"""The variables of each launcher give one place; strays and contradictions give a warning or a sentence."""

import itertools
import json

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.config.placement import Placement, list_tasks, name_first_host, put_away, read_placement, take_out
from support.launchers import LAUNCHERS, set_by_batch, set_by_hyperpodrun, set_by_srun, set_by_torchrun

# What may be left in a shell, an image or by another job: a value that one process has, and one that several have.
STRAYS = {
    "RANK": ("0", "1"),
    "WORLD_SIZE": ("1", "2"),
    "LOCAL_RANK": ("0", "1"),
    "LOCAL_WORLD_SIZE": ("1", "2"),
    "MASTER_ADDR": ("10.0.0.1",),
    "MASTER_PORT": ("29400",),
    "PET_NNODES": ("1", "2"),
    "PET_NODE_RANK": ("0", "1"),
    "PET_MASTER_ADDR": ("10.0.0.1",),
    "PET_NPROC_PER_NODE": ("8",),
    "AWS_BATCH_JOB_NUM_NODES": ("1", "2"),
    "AWS_BATCH_JOB_NODE_INDEX": ("0", "1"),
    "AWS_BATCH_JOB_MAIN_NODE_INDEX": ("0",),
    "SLURM_STEP_NUM_NODES": ("1", "2"),
    "SLURM_STEP_NODELIST": ("n[1-2]",),
    "SLURM_STEP_TASKS_PER_NODE": ("1(x2)",),
    "SLURM_NODEID": ("0", "1"),
    "SLURM_LOCALID": ("0", "1"),
    "SLURM_JOB_NUM_NODES": ("1", "2"),
}
TELLING = {name for name, values in STRAYS.items() if len(values) == 2} - {"SLURM_JOB_NUM_NODES"}

PLAIN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}


@pytest.mark.parametrize("name", LAUNCHERS)
@pytest.mark.parametrize("node", [0, 1])
def test_every_launcher_tells_the_node(name, node):
    placement = read_placement(LAUNCHERS[name](node), on_sagemaker=False)
    assert (placement.num_nodes, placement.node_rank, placement.local_rank) == (2, node, 0)
    assert placement.first_address == ("localhost" if (name, node) == ("AWS Batch", 0) else "127.0.0.1")
    assert placement.describe().startswith(f"Launched by {placement.launcher}: node {node + 1} of 2, the first at ")


@pytest.mark.parametrize("set_variables", [set_by_torchrun, set_by_hyperpodrun, set_by_srun])
def test_one_process_a_device_is_told_from_one_a_node(set_variables):
    placement = read_placement(set_variables(1, local_rank=3, num_local=4), on_sagemaker=False)
    assert (placement.node_rank, placement.local_rank, placement.num_local) == (1, 3, 4)
    assert "with 4 processes on this node" in placement.describe()


def test_nothing_means_this_machine_alone():
    assert read_placement({"PATH": "/bin", "MASTER_ADDR": "x", "PET_NPROC_PER_NODE": "8"}, False) == Placement()
    assert Placement().describe() == "Launched by hand, on this machine alone."


def test_sagemaker_wins_and_only_siblings_of_torchrun_count():
    alone = read_placement(PLAIN, on_sagemaker=True)
    assert (alone.launcher, alone.num_nodes, alone.first_address) == ("SageMaker", 1, None)
    assert alone.warning == (
        "RANK=1, WORLD_SIZE=2, MASTER_ADDR=10.0.0.1 passed over: SageMaker's resourceconfig.json names the hosts of "
        "the job."
    )
    sibling = read_placement(set_by_torchrun(1, 1, num_local=2), on_sagemaker=True)
    assert (sibling.num_nodes, sibling.local_rank, sibling.num_local, sibling.warning) == (1, 1, 2, None)


def test_the_innermost_launcher_counts():
    both = LAUNCHERS["TrainJob"](0) | set_by_torchrun(1, 1, num_local=2)
    assert read_placement(both, False).launcher == "torchrun"
    exported = set_by_srun(1, local_rank=1, num_local=2) | {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}
    assert read_placement(exported, False).num_local == 2


@pytest.mark.parametrize(
    "strays",
    [{"RANK": "0"}, {"LOCAL_RANK": "0", "WORLD_SIZE": "1"}, {"AWS_BATCH_JOB_NUM_NODES": "1"}, {"PET_NODE_RANK": "0"}],
)
def test_strays_of_a_single_process_are_passed_over_with_a_warning(strays):
    placement = read_placement(strays, on_sagemaker=False)
    assert placement.num_nodes == placement.num_local == 1
    assert placement.warning.endswith(": passed over.")


@pytest.mark.parametrize("names", list(itertools.combinations(STRAYS, 2)), ids="-".join)
def test_two_strays_never_make_a_job_wait_for_others(names):
    """Of one process they are passed over, of several they are a mistake: a job of them would be several jobs."""
    for values in itertools.product(*(STRAYS[name] for name in names)):
        strays = dict(zip(names, values, strict=True))
        if any(value == STRAYS[name][-1] for name, value in strays.items() if name in TELLING):
            with pytest.raises(UserError, match="in the environment"):
                read_placement(strays, on_sagemaker=False)
            continue
        placement = read_placement(strays, on_sagemaker=False)
        assert placement.num_nodes == placement.num_local == 1
        is_told = bool(placement.warning)
        assert is_told == any(
            strays.get("SLURM_JOB_NUM_NODES") == "2" or (name in TELLING and "SLURM" not in name) for name in names
        )


def test_a_world_of_one_process_is_this_machine_alone():
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    placement = read_placement(alone, on_sagemaker=False)
    assert (placement.num_nodes, placement.num_local, placement.warning) == (1, 1, None)


def test_slurm_without_srun_trains_on_this_node_alone_and_says_so():
    batch_script = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
    placement = read_placement(batch_script, on_sagemaker=False)
    assert placement.num_nodes == 1
    assert placement.warning.startswith("Slurm gives this job 2 nodes, and only this one trains: start the job by srun")


def test_the_shell_of_salloc_trains_on_its_node_alone_and_says_so():
    """With use_interactive_step the shell is a step of its own, on the first node."""
    step = {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "n1"}
    placement = read_placement(set_by_srun(0) | step, on_sagemaker=False)
    assert placement.num_nodes == 1
    assert placement.warning.startswith("Slurm gives this job 2 nodes, and only this one trains: start the job by srun")
    assert read_placement(set_by_srun(0), on_sagemaker=False).warning is None


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (PLAIN | {"MASTER_ADDR": ""}, r"RANK=1, WORLD_SIZE=2 in the environment without MASTER_ADDR: set all"),
        ({"RANK": "3"}, "RANK=3 in the environment without WORLD_SIZE, MASTER_ADDR"),
        ({"LOCAL_RANK": "1"}, "LOCAL_RANK=1 in the environment without RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_AD"),
        (PLAIN | {"RANK": "2"}, "RANK=2, WORLD_SIZE=2 in the environment: RANK counts from 0"),
        (PLAIN | {"LOCAL_RANK": "1"}, "LOCAL_RANK=1, MASTER_ADDR=10.0.0.1 in the environment without LOCAL_WORLD_SIZE"),
        (PLAIN | {"RANK": "one"}, "RANK='one' in the environment is no number"),
        (PLAIN | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK counts from 0"),
        (PLAIN | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, "each node must have as many processes"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "0"}, "without PET_MASTER_ADDR: set all of them, as Kubeflow does"),
        (LAUNCHERS["TrainJob"](0) | {"PET_NNODES": "1:3"}, "PET_NNODES='1:3' is a range: leave elasticPolicy out"),
        (set_by_batch(0) | {"AWS_BATCH_JOB_MAIN_NODE_INDEX": "0"}, "without AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4"),
        ({"AWS_BATCH_JOB_NUM_NODES": "2"}, "set all of them, as AWS Batch does"),
        (set_by_srun(0, local_rank=1), "these contradict each other"),
        (set_by_srun(0) | {"SLURM_STEP_TASKS_PER_NODE": "?"}, "these contradict each other"),
        (set_by_srun(0) | {"SLURM_STEP_TASKS_PER_NODE": "2,1"}, "each node must have as many tasks; give srun --ntask"),
    ],
)
def test_what_cannot_be_true_is_a_sentence(variables, sentence):
    with pytest.raises(UserError, match=sentence):
        read_placement(variables, on_sagemaker=False)


def test_variables_put_away_are_read_all_the_same_and_taken_out_again():
    variables = {"PATH": "/bin", **set_by_srun(1), **PLAIN, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    before, expected = dict(variables), read_placement(variables, on_sagemaker=False)
    put_away(variables)
    assert not {*PLAIN, "LOCAL_RANK", "PMI_SIZE"} & variables.keys()
    put_away(variables)  # a second time, as where the launcher is called from a script
    assert read_placement(variables, on_sagemaker=False) == expected
    take_out(variables)
    assert variables == before


def test_a_worker_does_not_take_its_own_rank_for_a_launchers():
    launcher = {"PATH": "/bin"}
    put_away(launcher)
    assert json.loads(launcher["LLM_TRAINER_LAUNCHED_WITH"]) == {}
    assert read_placement(launcher | PLAIN, on_sagemaker=False) == Placement()


@pytest.mark.parametrize(
    ("text", "host"),
    [("a", "a"), ("a[03-05,9]-x,b1", "a03-x"), ("a[7,9],b", "a7"), ("r[1-2]n[3-4]", "r1n3"), ("x-1,x-2", "x-1")],
)
def test_the_first_host_of_slurms_list(text, host):
    assert name_first_host(text) == host


def test_tasks_of_each_node():
    assert list_tasks("2(x3),1") == [2, 2, 2, 1]
    assert list_tasks("8") == [8]
    assert list_tasks("8(x") == []
