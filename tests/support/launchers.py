# SPDX-License-Identifier: Apache-2.0
"""The environment variables that launchers other than SageMaker set for a process of a job, by their own sources."""

import json
from collections.abc import Callable
from pathlib import Path

RECORDED = Path(__file__).with_name("srun_variables.json")


def set_by_torchrun(node: int, local_rank: int = 0, num_nodes: int = 2, num_local: int = 1) -> dict[str, str]:
    """torch/distributed/elastic/agent/server/local_elastic_agent.py."""
    rank = node * num_local + local_rank
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_nodes * num_local),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(num_local),
        "GROUP_RANK": str(node),
        "GROUP_WORLD_SIZE": str(num_nodes),
        "ROLE_RANK": str(rank),
        "ROLE_WORLD_SIZE": str(num_nodes * num_local),
        "ROLE_NAME": "default",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29400",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "none",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    }


def set_by_hyperpodrun(node: int, local_rank: int = 0, num_local: int = 1) -> dict[str, str]:
    """hyperpod-elastic-agent 1.1.3, hyperpod_elastic_agent.py: GROUP_WORLD_SIZE counts processes."""
    variables = set_by_torchrun(node, local_rank, num_local=num_local)
    return variables | {"GROUP_WORLD_SIZE": variables["WORLD_SIZE"], "TORCHELASTIC_USE_AGENT_STORE": "False"}


def set_by_pytorch_job(node: int) -> dict[str, str]:
    """training-operator 1.8, pkg/controller.v1/pytorch/envvar.go: RANK is the pod's, WORLD_SIZE of the processes."""
    return {
        "PYTHONUNBUFFERED": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "23456",
        "RANK": str(node),
        "WORLD_SIZE": "16",
        "PET_NPROC_PER_NODE": "8",
        "PET_NNODES": "2",
        "PET_NODE_RANK": str(node),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": "23456",
    }


def set_by_older_pytorch_job(node: int) -> dict[str, str]:
    """training-operator before 1.7, the same file: no PET_*, and one process a pod."""
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23456", "RANK": str(node), "WORLD_SIZE": "2"}


def set_by_train_job(node: int) -> dict[str, str]:
    """trainer 2, pkg/runtime/framework/plugins/torch/torch.go."""
    return {
        "PET_NNODES": "2",
        "PET_NPROC_PER_NODE": "auto",
        "PET_NODE_RANK": str(node),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": "29500",
    }


def set_by_srun(node: int, local_rank: int = 0, num_local: int = 1) -> dict[str, str]:
    """As Slurm 22.05 set them, in srun_variables.json; here the nodes' names are addresses."""
    rank = node * num_local + local_rank
    return json.loads(RECORDED.read_text()) | {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NNODES": "2",
        "SLURM_PROCID": str(rank),
        "SLURM_NTASKS": str(2 * num_local),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local_rank),
        "SLURM_STEP_NUM_NODES": "2",
        "SLURM_STEP_NUM_TASKS": str(2 * num_local),
        "SLURM_STEP_TASKS_PER_NODE": f"{num_local}(x2)",
        "SLURM_STEP_NODELIST": "127.0.0.[1-2]",
        "SLURM_JOB_NODELIST": "127.0.0.[1-2]",
        "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.9",
        "PMI_RANK": str(rank),
        "PMI_SIZE": str(2 * num_local),  # with --mpi=pmi2
    }


def set_by_batch(node: int) -> dict[str, str]:
    """AWS Batch, "Environment variables"; the main node is the second one here, and has no address of itself."""
    address = {} if node == 0 else {"AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": "127.0.0.1"}
    return {
        "AWS_BATCH_JOB_ID": f"id#{1 - node}",
        "AWS_BATCH_JOB_NUM_NODES": "2",
        "AWS_BATCH_JOB_MAIN_NODE_INDEX": "1",
        "AWS_BATCH_JOB_NODE_INDEX": str(1 - node),
        **address,
    }


LAUNCHERS: dict[str, Callable[[int], dict[str, str]]] = {
    "torchrun": set_by_torchrun,
    "hyperpodrun": set_by_hyperpodrun,
    "PyTorchJob": set_by_pytorch_job,
    "older PyTorchJob": set_by_older_pytorch_job,
    "TrainJob": set_by_train_job,
    "Slurm": set_by_srun,
    "AWS Batch": set_by_batch,
}
