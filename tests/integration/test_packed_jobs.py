# SPDX-License-Identifier: Apache-2.0
"""Packing in whole jobs: without padding the same steps as with it, or fewer and fuller ones."""

import json
import random
import shutil

import pytest

from support.packed_models import LEAK, build_model
from support.sagemaker_tree import metrics_of

pytestmark = pytest.mark.long


@pytest.fixture
def make_job(make_tree):
    def make(**hyperparameters):
        tree = make_tree()
        generator = random.Random(0)
        rows = [{"text": "a" * round(generator.lognormvariate(3, 1) + 1)} for _ in range(29)]
        for file in ("train/train.jsonl", "validation/validation.json"):
            tree.write(f"input/data/{file}", "".join(f"{line}\n" for line in map(json.dumps, rows)))
        tree.change(**hyperparameters)
        tree.result = tree.run()
        assert tree.result.returncode == 0, tree.result.stdout
        return tree

    return make


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_packing_the_rows_of_a_batch_changes_no_step(make_job, ranks):
    shared = {"train_sampling_strategy": "random", "per_device_eval_batch_size": "8", "nproc_per_node": ranks}
    packed, padded = make_job(**shared), make_job(**shared, packing="false")
    assert "Packing: the rows of a batch share sequences (sdpa attention keeps them apart)" in packed.result.stdout
    assert "Packing off: packing=false; train_sampling_strategy=random" in padded.result.stdout
    for key in ("train_loss", "eval_loss", "train_token_accuracy", "tokens"):
        values = metrics_of(packed.result.stdout, key)
        assert values == pytest.approx(metrics_of(padded.result.stdout, key), rel=1e-4)
    assert packed.manifest["packing"]["mode"] == "batch"


def test_packing_the_data_set_takes_fewer_steps(make_job):
    tree = make_job(packing="true", max_length="200", per_device_train_batch_size="2", eval_packing="false")
    report = tree.manifest["packing"]["train"]
    assert tree.manifest["packing"]["mode"] == "data set"
    assert tree.manifest["num_steps"] == -(-report["num_sequences"] // 2) < 29 // 2
    assert f"Data train: packed 29 rows into {report['num_sequences']} sequences" in tree.result.stdout
    assert "Data validation: packed" not in tree.result.stdout
    assert metrics_of(tree.result.stdout, "tokens")[-1] == tree.manifest["data"]["train"]["num_tokens"]


@pytest.mark.parametrize("method", ["dpo", "kto", "reward"])  # KTO takes pairs, too
def test_answers_are_padded_where_the_model_would_let_them_see_each_other(make_tree, method):
    tree = make_tree()
    shutil.rmtree(tree.base_dir / "input/data/validation")
    build_model(LEAK["bloom"]).save_pretrained(tree.base_dir / "input/data/model")
    pair = {"chosen": "Yes.", "rejected": "No, that is not so."}
    rows = [{"prompt": f"Is {number} less than {number + 1}?", **pair} for number in range(8)]
    tree.write("input/data/train/train.jsonl", "".join(f"{line}\n" for line in map(json.dumps, rows)))
    tree.write_job({"method": method, "max_steps": "2", "per_device_train_batch_size": "4"}, ("model", "train"))
    result = tree.run()
    assert result.returncode == 0, result.stdout
    assert "Packing off: Bloom" in result.stdout
    assert "lets a row see the one before it" in result.stdout
    assert "train_sampling_strategy=group_by_length" in result.stdout
    assert tree.manifest["export"]["proven"]


def test_a_compiled_model_trains_on_shapes_that_change(make_job):
    """Backend aot_eager takes the same way through Dynamo and autograd as inductor, without a compiler of C++."""
    shared = {"max_steps": "6", "eval_strategy": "steps", "eval_steps": "3", "logging_steps": "1"}
    plain = make_job(**shared)
    compiled = make_job(**shared, torch_compile="true", torch_compile_backend="aot_eager")
    assert "recompile_limit" not in compiled.result.stdout
    for key in ("train_loss", "grad_norm", "eval_loss", "tokens"):
        values = metrics_of(compiled.result.stdout, key)
        assert values == pytest.approx(metrics_of(plain.result.stdout, key), rel=1e-4)
    compiled.change(max_steps="8")
    resumed = compiled.run()
    assert resumed.returncode == 0, resumed.stdout
    assert "Resuming from" in resumed.stdout
    assert compiled.manifest["num_steps"] == 8
