# SPDX-License-Identifier: Apache-2.0
"""A job that cannot work ends with exit code 1, one sentence in output/failure and nothing in model/."""

import json
import os
import shutil

import pytest

from support.holding import hold_function

pytestmark = pytest.mark.long


def fail(tree, *arguments):
    """Run a job that must fail; the first line of its failure file."""
    result = tree.run(*arguments)
    assert result.returncode == 1, result.stdout
    assert "Traceback" not in result.stdout
    assert not tree.model_files
    assert len(tree.failure) <= 1024
    sentence = tree.failure.splitlines()[0]
    assert sentence in result.stdout
    return sentence


def test_a_missing_model_id(tree):
    shutil.rmtree(tree.base_dir / "input/data/model")
    tree.write_job({}, ("train",))
    assert fail(tree).startswith("model_id is missing: give a Hugging Face model id")


def test_a_missing_channel(tree):
    shutil.rmtree(tree.base_dir / "input/data/train")
    tree.write_job({}, ("model",))
    assert fail(tree).startswith("Training data is missing: give a channel 'train'")


def test_an_empty_channel(tree):
    (tree.base_dir / "input/data/train/train.jsonl").unlink()
    assert fail(tree).startswith(
        "Channel 'train' has no .json, .jsonl, .csv, .tsv, .parquet, .arrow, .feather or .tar file"
    )


def test_a_model_folder_without_weights(tree):
    (tree.base_dir / "input/data/model/model.safetensors").unlink()
    assert (
        "has no weights: put model.safetensors there, or the files of a model.safetensors.index.json with it."
        in fail(tree)
    )


def test_an_unknown_setting(tree):
    tree.change(lora_rnak="8", learning_rat="1")
    sentence = fail(tree)
    assert sentence.startswith("Hyperparameter 'lora_rnak' is not a setting: the nearest valid name is 'lora_r'.")
    assert "- Hyperparameter 'learning_rat' is not a setting" in tree.failure


def test_hyperparameters_that_are_no_json(tree):
    tree.write("input/config/hyperparameters.json", "{'a': 1}")
    assert "hyperparameters.json is not valid JSON" in fail(tree)


def test_a_stray_argument(tree):
    assert fail(tree, "fast").startswith("Argument 'fast' is not of the form --key value")


def test_unreadable_json(tree):
    tree.write("input/data/train/train.jsonl", '{"text": "fine"}\n{"text": \n')
    assert fail(tree).startswith("train.jsonl line 2 is not valid JSON")


def test_a_row_without_a_usable_field_with_two_ranks(tree):
    tree.change(nproc_per_node="2")
    tree.write("input/data/train/train.jsonl", '{"text": "fine"}\n{"prompt": "a", "answer": "b"}\n')
    assert fail(tree).startswith("train.jsonl row 2 has no field 'input_ids' or 'messages' or ")


def test_4_bit_where_bitsandbytes_cannot_run(tree):
    tree.write("broken/bitsandbytes/__init__.py", "raise ImportError('no native library for this machine')")
    tree.environment["PYTHONPATH"] = str(tree.base_dir / "broken")
    tree.change(load_in_4bit="true")
    sentence = fail(tree)
    assert sentence.startswith("load_in_4bit=true: bitsandbytes cannot run here (no native library for this machine)")


def test_weights_that_are_cut_short(tree):
    weights = tree.base_dir / "input/data/model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert "is 141,800 bytes of 142,800: it was cut off; download the model again." in fail(tree)


def test_modules_that_the_model_does_not_have(tree):
    tree.change(target_modules="query_proj")
    sentence = (
        "target_modules: the model has no 'query_proj'; the nearest is 'q_proj', and there are embed_tokens, q_proj"
    )
    assert fail(tree).startswith(sentence)


def test_a_hub_model_without_a_network(tree):
    tree.change(model_id="no-such-organization/no-such-model")
    tree.environment["HF_HUB_OFFLINE"] = "1"
    assert fail(tree).startswith("model_id='no-such-organization/no-such-model' could not be downloaded")


def test_an_error_of_the_program_itself_is_told_with_its_rank_and_logged_with_its_traceback(tree):
    tree.write("broken/peft/__init__.py", "raise RuntimeError('disk on fire')")
    tree.environment["PYTHONPATH"] = str(tree.base_dir / "broken")
    result = tree.run()
    assert result.returncode == 1
    assert "disk on fire" in result.stdout
    assert tree.failure.startswith("Rank 0")


def test_a_killed_worker_is_told_with_its_rank_and_cause(tree, start):
    tree.change(num_train_epochs="10000")
    job = start(tree)
    job.wait_for("train_loss=")
    job.workers()[0].kill()
    assert job.end() == 1
    assert tree.failure.startswith("Rank 0 was killed by signal 9, most likely because the host ran out of memory")


def test_a_rank_that_hangs_is_named(tree, tmp_path):
    """Rank 0 waits in gloo, which knows no more than that nobody answers."""
    python_path, step = os.environ.get("PYTHONPATH", ""), "transformers.trainer:Trainer.training_step"
    tree.environment |= hold_function(tmp_path / "held", python_path, step, rank=1)
    tree.change(nproc_per_node="2", ddp_timeout="5")
    result = tree.run()
    assert result.returncode == 1, result.stdout
    assert tree.failure.startswith("Rank 1 did not come to "), result.stdout
    assert "for which rank 0 waited longer than ddp_timeout (now 5 s)" in tree.failure
    assert json.loads((tree.base_dir / "output/data/collectives-rank-0.json").read_text())["entries"]
