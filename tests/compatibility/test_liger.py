# SPDX-License-Identifier: Apache-2.0
"""Liger's own kernels on a CPU, in Triton's interpreter: what they compute, which of them run, what they keep.

liger-kernel and triton lie in an environment of their own, `.venv-interpreter`, which is made here from the pins of the
image for GPUs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.liger_families import FAMILIES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".venv-interpreter"
SCRIPT = ROOT / "tests/support/liger_on_cpu.py"
NAMES = (*FAMILIES, "qwen3-moe with experts")
FLOAT32 = 2**-20  # sums of a few hundred products, each rounded to 24 bits
# Liger's option for a kernel, by a part of the kernel's name.
KERNELS = {"rms_norm": "rms_norm", "rope": "rope", "swiglu": "swiglu", "geglu": "geglu", "moe": "swiglu"}

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone"),
]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Variables with which a child process finds the packages, and its kernels run in the interpreter."""
    subprocess.run(["docker/venv.sh", FOLDER.name, "interpreter", "--no-deps"], check=True, cwd=ROOT)
    packages = next(FOLDER.glob("lib/python*/site-packages"))
    paths = [str(path) for path in (ROOT / "code", ROOT / "tests", packages)]
    # Its kernel for experts would try its variants with clocks of a GPU.
    variables = {"TRITON_INTERPRET": "1", "LIGER_FUSED_MOE_AUTOTUNE": "0", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **variables, "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def compared(environment) -> dict[str, dict]:
    command = [sys.executable, SCRIPT, "compare"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", NAMES)
def test_a_family_computes_the_same_with_the_kernels_that_the_log_names(compared, name):
    found = compared[name]
    assert found["loss"] < FLOAT32
    assert found["gradients"] < 4 * FLOAT32
    ran = {kernel for part, kernel in KERNELS.items() if any(part in name for name in found["ran"])}
    assert ran == set(found["told"])


def test_a_whole_job_has_the_losses_of_one_without(environment, make_tree):
    losses = []
    for starts_with in ([sys.executable, str(SCRIPT)], [sys.executable, "-m", "llm_trainer"]):
        tree = make_tree()
        tree.change(per_device_train_batch_size="2", max_steps="3", max_length="40", sample_prompts="0", lora_r="4")
        variables = {**environment, "SAGEMAKER_BASE_DIR": str(tree.base_dir)}
        done = subprocess.run([*starts_with, "train"], env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        is_on = "Liger kernels: on (RMSNorm, rotary embeddings and SwiGLU; the loss is TRL's)" in done.stdout
        assert is_on == (starts_with[1] == str(SCRIPT))
        values = [record["values"] for record in tree.read_journal() if record["kind"] == "metrics"]
        losses.append([each["train_loss"] for each in values if "train_loss" in each])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=4 * FLOAT32)


@pytest.mark.parametrize("tests", ["model/test_liger.py", "model/memory/test_fused_kernels.py"])
def test_what_else_asks_for_liger_runs(environment, tests):
    """What a layer keeps, by Liger's own functions, and which model types it knows."""
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", "-rs", f"tests/unit/{tests}"]
    variables = {**environment, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert "SKIPPED" not in done.stdout
