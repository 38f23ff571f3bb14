# SPDX-License-Identifier: Apache-2.0
"""Jobs that fail on their machine or on the Hub: output/failure says why, and what to change."""

import os
import re
import subprocess

import pytest

from support.fake_hub import MODEL, FakeHub
from support.sagemaker_tree import LLM_TRAINER
from support.small_disk import small_disk, with_shared_memory
from support.waiting import GUARD_SECONDS

pytestmark = pytest.mark.long


def fail(tree, *arguments: str) -> tuple[str, str]:
    """Run a job that must fail; its reason and its log."""
    result = tree.run(*arguments)
    assert result.returncode == 1, result.stdout
    assert len(tree.failure) <= 1024
    assert len(tree.failure.splitlines()) == 1
    assert tree.failure in result.stdout
    assert not tree.model_files
    return tree.failure, result.stdout


def read_traceback(tree) -> str:
    """The only traceback's file among what SageMaker uploads."""
    (file,) = (tree.base_dir / "output/data/failures").iterdir()
    assert file.name == "algo-1-rank-0.txt"
    return file.read_text(encoding="utf-8")


def holds(log: str, text: str) -> bool:
    """Tell whether a log has a text, whose lines it indents after the first."""
    first, *others = filter(None, text.splitlines())
    return {first, *("  " + line for line in others)} <= set(log.splitlines())


def test_a_full_checkpoint_disk(tree):
    tree.change(use_peft="false", save_steps="1")
    with small_disk(tree.base_dir / "checkpoints", 300) as folder:
        reason, log = fail(tree)
        assert list(folder.iterdir()) == []  # nothing half-written, and room for what is to be uploaded
    assert re.fullmatch(
        rf"Rank 0 found no space on the disk of {folder} \(0\.00 of 0\.00 GB are free\): raise the job's "
        r"VolumeSizeInGB, or keep fewer checkpoints \(save_total_limit\)\.",
        reason,
    )
    assert holds(log, read_traceback(tree))


def test_a_full_temporary_disk_which_also_holds_the_reason(tree):
    tree.write("input/data/train/train.jsonl", '{"text": "the same row again and again"}\n' * 20_000)
    with small_disk(tree.base_dir / "tmp", 800) as folder:
        tree.environment["TMPDIR"] = str(folder)
        reason, _ = fail(tree)
    assert reason.startswith(f"Rank 0 found no space on the disk of {folder}/llm-trainer-")


def test_a_gated_model(tree, tiny_model):
    hub = FakeHub(tiny_model)
    hub.refuse(403, X_Error_Code="GatedRepo")
    tree.write_job({"model_id": MODEL}, ("train",))
    tree.environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_secretOfTheTest"}
    tree.environment["SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY"] = str(tree.base_dir / "cache")
    reason, log = fail(tree)
    hub.close()
    assert reason.startswith(f"model_id='{MODEL}' is gated and the given token may not read it: accept its licence")
    assert "HF_TOKEN in the job's Environment" in reason
    assert "hf_secretOfTheTest" not in log
    assert "Bearer hf_secretOfTheTest" in hub.tokens
    assert "Traceback" not in log


def test_an_error_of_the_program_leaves_its_traceback_with_the_output(tree):
    token, key = "hf_" + "secretOfTheTest" * 2 + "1234", "wandbKeyOfTheTest4711"  # the worker is given neither
    tree.write("broken/peft/__init__.py", f"raise RuntimeError('disk on fire, says {token}')  # {key}")
    tree.environment |= {
        "PYTHONPATH": f"{tree.base_dir}/broken:{os.environ.get('PYTHONPATH', '')}",
        "HF_TOKEN": token,
        "WANDB_API_KEY": key,
    }
    reason, log = fail(tree)
    assert reason == (
        "Rank 0 failed with RuntimeError: disk on fire, says *** (the traceback is in the log and in "
        "output/data/failures)."
    )
    traceback = read_traceback(tree)
    assert "raise RuntimeError('disk on fire, says ***')  # ***" in traceback
    assert traceback.startswith("Traceback (most recent call last)")
    assert "RuntimeError: disk on fire, says ***" in traceback
    assert token not in log


def test_a_small_shared_memory_under_data_loader_workers_is_no_endless_wait(tree):
    tree.change(dataloader_num_workers="2")
    result = subprocess.run(
        [*with_shared_memory("64k"), str(LLM_TRAINER), "train"],
        env={**os.environ, "SAGEMAKER_BASE_DIR": str(tree.base_dir)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=GUARD_SECONDS,
        check=False,
    )
    assert result.returncode == 1, result.stdout
    assert tree.failure == (
        "Rank 0 ran out of shared memory (/dev/shm): set dataloader_num_workers=0; under docker run add --shm-size=8g "
        "(SageMaker has no setting for it)."
    )
