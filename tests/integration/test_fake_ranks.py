# SPDX-License-Identifier: Apache-2.0
"""A worker as rank 0 of up to 512 ranks that are not there sends what bench/scaling.py computes."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from llm_trainer.config.schema import Settings
from llm_trainer.model.memory.shape import read_shape

sys.path.append(str(Path(__file__).parents[2] / "bench"))
import ranks
from ranks import RANDOM_MODEL, Job, build_random_model, lay_out

from llm_trainer.planning.traffic import SMALL_A_STEP, count_traffic

pytestmark = pytest.mark.long

HOOKS = Path(__file__).parents[1] / "support/fake_ranks"
BATCHES = 2  # a step
RANKS = (8, 64, 512)


@dataclass(frozen=True)
class Sent:
    """What rank 0 has sent in a step of two batches."""

    calls: dict[str, int]
    bytes: dict[str, int]
    objects: int  # pickled, from all ranks
    seconds: float  # of CPU time
    memory_bytes: int  # of the process at its peak

    def sum(self, what, *names):
        return sum(getattr(self, what).get(name, 0) for name in names)


@pytest.fixture(scope="module")
def send(tmp_path_factory):
    model = build_random_model(tmp_path_factory.mktemp("model"))

    def train(num_ranks, use_peft) -> Sent:
        job, tree = Job(num_ranks, "fsdp", use_peft, pieces=BATCHES), tmp_path_factory.mktemp("opt-ml")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "ROWS", 4 * BATCHES * num_ranks)
            lay_out(tree, job, model)
        file = tree / "input/config/hyperparameters.json"
        changes = {"nproc_per_node": "2", "torch_dtype": "bfloat16", "logging_steps": "100", "save_steps": "100"}
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        path = os.pathsep.join(filter(None, (str(HOOKS), os.environ.get("PYTHONPATH"))))
        variables = {"SAGEMAKER_BASE_DIR": str(tree), "FAKE_RANKS": str(num_ranks), "PYTHONPATH": path}
        command = [sys.executable, "-m", "llm_trainer", "train"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        (line,) = [line for line in run.stdout.splitlines() if "SENT " in line] or pytest.fail(run.stdout[-3000:])
        return Sent(**json.loads(line.partition("SENT ")[2]))

    return train


@pytest.mark.parametrize("use_peft", [True, False], ids=["LoRA", "all weights"])
def test_any_number_of_ranks_send_what_is_computed(send, use_peft):
    settings = Settings(**Job(8, "fsdp", use_peft).settings)
    weights = torch.bfloat16 if use_peft else torch.float32
    shape = read_shape(RANDOM_MODEL, settings.model, settings.adapter, weights)
    sent = {num_ranks: send(num_ranks, use_peft) for num_ranks in RANKS}
    for num_ranks, found in sent.items():
        expected = count_traffic(shape, torch.bfloat16, num_ranks)
        gathers, reductions = ("_allgather_base_", "all_gather_into_tensor"), ("_reduce_scatter_base_",)
        gathered, num_gathers = expected.gathered + expected.gathered_again, expected.units + expected.units_again
        assert found.sum("bytes", *gathers) == pytest.approx(BATCHES * gathered, rel=0.02)
        assert found.sum("bytes", *reductions) == pytest.approx(BATCHES * expected.reduced, rel=0.02)
        assert found.sum("calls", *gathers) == pytest.approx(BATCHES * num_gathers, rel=0.02)
        assert found.sum("calls", *reductions) == pytest.approx(BATCHES * expected.buckets, rel=0.02)
        small = found.calls.keys() - {*gathers, *reductions}
        assert found.sum("calls", *small) == SMALL_A_STEP + 1  # with the agreement to stop, for which nobody waits
        assert found.objects == 0
    few, many = sent[RANKS[0]], sent[RANKS[-1]]
    assert many.memory_bytes < 1.3 * few.memory_bytes
    assert many.seconds < 3 * few.seconds  # work for each rank would take 64 times as long
