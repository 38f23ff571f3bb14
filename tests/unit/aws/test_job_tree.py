# SPDX-License-Identifier: Apache-2.0
"""The tree for checks is the one that SageMaker will lay out, and goes again."""

import os

from llm_trainer.aws.job_tree import lay_out_tree, stand_in
from llm_trainer.config.environment import read_environment
from support.aws_server import write_rows

SHARDED = {"TrainingInputMode": "FastFile", "S3DistributionType": "ShardedByS3Key"}


def test_the_tree_is_read_as_a_jobs(tmp_path, monkeypatch):
    folder = write_rows(tmp_path / "rows")
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", "/kept")
    monkeypatch.setenv("LLM_TRAINER_DATA_DIR", "/kept-too")
    hyperparameters = {"model_id": "/opt/ml/input/data/model", "run_name": "/opt/ml/input/data"}
    places = {"train": folder, "validation": folder / "rows.jsonl", "model": None}
    with lay_out_tree(hyperparameters, places, {"train": SHARDED, "model": {}}, "ml.g6.2xlarge", 2) as tree:
        with stand_in(tree):
            environment = read_environment()
        assert environment.hosts == ("algo-1", "algo-2")
        assert environment.sharded_channels == {"train"}
        assert environment.instance_type == "ml.g6.2xlarge"
        assert set(environment.channels) == {"train", "validation", "model"}
        assert (environment.channels["train"] / "rows.jsonl").is_file()
        assert (environment.channels["validation"] / "rows.jsonl").is_file()
        assert not list(environment.channels["model"].iterdir())
        assert environment.hyperparameters["model_id"] == str(tree / "input/data/model")
        assert environment.hyperparameters["run_name"] == "/opt/ml/input/data"
    assert not tree.exists() and (folder / "rows.jsonl").exists()
    assert (os.environ["SAGEMAKER_BASE_DIR"], os.environ["LLM_TRAINER_DATA_DIR"]) == ("/kept", "/kept-too")
