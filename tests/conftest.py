# SPDX-License-Identifier: Apache-2.0
"""A tiny model made once, and an /opt/ml tree of links to it for every test."""

import json
import shutil
from pathlib import Path

import pytest

from sagemaker_tree import HYPERPARAMETERS, ROWS, SageMakerTree
from tiny_model import build_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def make_tree(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path):
    """Makes trees of a complete job: channels model, train (.jsonl) and validation (.json)."""

    def make() -> SageMakerTree:
        tree = SageMakerTree(tmp_path_factory.mktemp("opt-ml"))
        shutil.copytree(tiny_model, tree.base_dir / "input/data/model")
        tree.write("input/data/train/train.jsonl", "".join(f"{line}\n" for line in map(json.dumps, ROWS)))
        tree.write("input/data/validation/validation.json", ROWS[:4])
        tree.write_job(HYPERPARAMETERS, ("model", "train", "validation"))
        return tree

    return make


@pytest.fixture
def tree(make_tree) -> SageMakerTree:
    return make_tree()
