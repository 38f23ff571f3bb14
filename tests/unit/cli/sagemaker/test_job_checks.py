# SPDX-License-Identifier: Apache-2.0
"""What SageMaker would take and the job could not run with is told before it is submitted."""

from llm_trainer.aws.options import JobOptions
from llm_trainer.cli.sagemaker.job_checks import find_local_paths, find_misread, find_unreachable

SECRET = "arn:aws:secretsmanager:us-west-2:123456789012:secret:hub-AbCdEf"


def test_a_job_without_a_network_needs_none():
    settings = {"model_id": "Qwen/Qwen3-0.6B", "push_to_hub": True, "wandb_token": SECRET, "lora_r": 8}
    options = JobOptions(network_isolation=True, environment={"HF_TOKEN": SECRET, "NCCL_DEBUG": "INFO"})
    told = list(find_unreachable(options, settings, ["train"]))
    assert "which has model_id='Qwen/Qwen3-0.6B': give the model's files as channel model" in told[0]
    assert "remove push_to_hub" in told[1]
    assert [text.split(" names")[0].split()[-1] for text in told[2:]] == ["wandb_token", "HF_TOKEN"]
    assert list(find_unreachable(options, {"model_id": "Qwen/Qwen3-0.6B"}, ["train", "model"])) == [told[3]]
    assert list(find_unreachable(JobOptions(), settings, ["train"])) == []
    taught = {"teacher_model_name_or_path": "Qwen/Qwen3-8B"}
    (text,) = find_unreachable(JobOptions(network_isolation=True), taught, ["model"])
    assert "teacher_model_name_or_path='Qwen/Qwen3-8B': give the teacher's files as channel teacher" in text


def test_a_path_of_this_machine_is_none_of_the_jobs(tmp_path):
    settings = {
        "model_id": str(tmp_path),
        "adapter_path": "./adapter",
        "train_dataset_path": "/opt/ml/input/data/train",
    }
    told = list(find_local_paths(settings))
    assert [text.partition("=")[0] for text in told] == ["model_id", "adapter_path"]
    assert "give the folder as channel adapter" in told[1]


def test_channels_that_are_read_in_their_own_way_are_there():
    options = JobOptions(fast_file=["train", "test"], sharded=["validation"])
    told = list(find_misread(options, ["config"], {"train": "s3://bucket/rows"}))
    assert "fast_file names 'test', which is no channel of this job: its channels are config, train" in told[0]
    assert "sharded names 'validation'" in told[1]
    assert "fast_file names 'train', and s3://bucket/rows is no folder: end its prefix with a slash" in told[2]
    assert list(find_misread(JobOptions(fast_file=["config"]), ["config"], {})) == []
