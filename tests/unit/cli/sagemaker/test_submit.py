# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer submit`, from a YAML file to the request that AWS gets."""

import json
import shutil

import pytest
import yaml

from llm_trainer.cli.main import run_command
from llm_trainer.cli.sagemaker.rehearsal import Place
from support.aws_server import rehearse_well, write_rows
from support.measures import ROOT

RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))
OPTIONS = ["--image", "sagemaker-llm-trainer:cuda", "--role", "Trainer", "--output", "s3://bucket/output"]
ROLE = "arn:aws:iam::123456789012:role/Trainer"
IN_S3 = ["--channels", '{"train": "s3://bucket/rows/", "model": "s3://bucket/model/"}']
NOTHING = {"problems": [], "warnings": []}
CHECK_TREE = "llm_trainer.cli.sagemaker.submit.check_tree"
HUB_TOKEN = "hf_" + "aB3" * 12


@pytest.fixture(autouse=True)
def no_data_dir(monkeypatch):
    """--data-dir sets the variable for good."""
    monkeypatch.setenv("LLM_TRAINER_DATA_DIR", "")


@pytest.fixture
def channels(tmp_path, tiny_model):
    write_rows(tmp_path / "data/train")
    shutil.copytree(tiny_model, tmp_path / "data/model")
    return tmp_path / "data"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_request(aws, recipe, capsys):
    digest = aws.furnish()
    assert run_command(["submit", str(recipe), *OPTIONS, *IN_S3, "--dry-run"]) == 0
    request = json.loads(capsys.readouterr().out)
    given = yaml.safe_load(recipe.read_text())
    assert request["TrainingJobName"].startswith(recipe.stem.replace(".", "-"))
    assert request["HyperParameters"]["model_id"] == given["model_id"]
    assert request["ResourceConfig"]["InstanceType"] == given["job"]["instance_type"]
    assert request["AlgorithmSpecification"]["TrainingImage"].endswith(digest)
    assert request["RoleArn"] == ROLE
    assert aws.list_arguments("CreateTrainingJob") == []


def test_a_dry_run_needs_no_aws(monkeypatch, capsys):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
    assert run_command(["submit", "--config", str(RECIPES[0]), *OPTIONS, *IN_S3, "--dry-run"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["AlgorithmSpecification"]["TrainingImage"] == OPTIONS[1]
    assert f"Warning: {OPTIONS[1]} stays as it was given. No AWS credentials" in printed.err


def test_a_job_is_uploaded_and_started(aws, channels, monkeypatch, capsys):
    monkeypatch.setattr(CHECK_TREE, rehearse_well)
    digest = aws.furnish()
    words = [*OPTIONS, "--data-dir", str(channels), "--instance_type", "ml.g6.2xlarge", "--name", "job-1"]
    assert run_command(["submit", *words, "--max_length", "64", "--learning-rate", "1e-4"]) == 0
    (request,) = aws.list_arguments("CreateTrainingJob")
    assert request["HyperParameters"] == {"max_length": "64", "learning_rate": "1e-4", "max_run_seconds": "86400"}
    assert request["AlgorithmSpecification"]["TrainingImage"].endswith(digest)
    uris = {each["ChannelName"]: each["DataSource"]["S3DataSource"]["S3Uri"] for each in request["InputDataConfig"]}
    assert set(uris) == {"train", "model"}
    uploads = aws.list_uploads()
    assert f"{uris['train'].removeprefix('s3:/')}rows.jsonl" in uploads
    assert len(uploads) == 1 + len([file for file in (channels / "model").iterdir() if file.is_file()])
    assert not [path for path in uploads if ".env" in path]
    assert "llm-trainer watch job-1" in capsys.readouterr().out


@pytest.mark.long
def test_a_job_that_would_fail_is_not_started(aws, channels, capsys):
    aws.furnish()
    (channels / "train/rows.jsonl").write_text('{"question": "Hi"}\n')
    words = [*OPTIONS, "--data-dir", str(channels), "--instance_type", "ml.g6.2xlarge"]
    assert run_command(["submit", *words]) == 1
    assert "rows.jsonl row 1 has no field" in capsys.readouterr().err
    assert aws.requests == []


@pytest.mark.parametrize(
    ("entry", "words", "told"),
    [
        ({"fits": False, "how": "DDP"}, [], "The job does not fit on 1 x ml.g6.2xlarge (DDP)"),
        (
            {"fits": True, "dollars": 12.5, "dollars_an_hour": 1.0},
            ["--max-dollars", "10"],
            "It costs about 12.50 dollars on 1 x ml.g6.2xlarge",
        ),
        ({"fits": True, "dollars": None}, ["--max-dollars=10"], "the cost is not known: give --prices, and --rows"),
        (
            {"fits": True, "dollars": 1.0, "dollars_an_hour": 1.0},
            ["--max-dollars", "ten"],
            "--max-dollars='ten' is no amount",
        ),
    ],
)
def test_a_job_that_is_too_large_or_too_dear_is_not_started(aws, channels, monkeypatch, capsys, entry, words, told):
    planned = {"instances": [{"instance_type": "ml.g6.2xlarge", "count": 1, **entry}], "problems": [], "warnings": []}
    monkeypatch.setattr(CHECK_TREE, lambda *asked: {"validate": NOTHING, "plan": planned})
    assert told in submit_wrongly(capsys, "--data-dir", str(channels), *words)
    assert aws.requests == []


def test_a_budget_that_is_kept_asks_plan_in_the_users_words(aws, channels, monkeypatch, tmp_path):
    aws.furnish()
    asked = []

    def check(tree, commands, places, words):
        asked.append((commands, places, words))
        entry = {"fits": True, "dollars": 9.5, "dollars_an_hour": 5.0}
        instances = [{"instance_type": "ml.g6.2xlarge", "count": 1, **entry}]
        return {"validate": NOTHING, "plan": {"instances": instances} | NOTHING}

    monkeypatch.setattr(CHECK_TREE, check)
    words = ["--max-dollars", "10", "--prices-file", str(tmp_path / "prices.json"), "--rows", "100"]
    given = [*OPTIONS, "--instance_type", "ml.g6.2xlarge", "--data-dir", str(channels)]
    assert run_command(["submit", *given, *words]) == 0
    plan_words = ("--prices-file", str(tmp_path / "prices.json"), "--rows", "100")
    assert asked == [(("validate", "plan"), [Place("ml.g6.2xlarge", 1)], plan_words)]
    (request,) = aws.list_arguments("CreateTrainingJob")
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 7200}
    assert request["HyperParameters"]["max_run_seconds"] == "7200"


def test_channels_are_read_as_asked(aws, capsys):
    aws.furnish()
    words = ["--instance_type", "ml.g6.2xlarge", "--instance_count", "2", "--dry-run"]
    assert run_command(["submit", *OPTIONS, *IN_S3, *words, "--fast_file", "train", "--sharded", "train"]) == 0
    request = json.loads(capsys.readouterr().out)
    channels = {each["ChannelName"]: each for each in request["InputDataConfig"]}
    assert [channels[name]["InputMode"] for name in ("train", "model")] == ["FastFile", "File"]
    kinds = {name: each["DataSource"]["S3DataSource"]["S3DataDistributionType"] for name, each in channels.items()}
    assert kinds == {"train": "ShardedByS3Key", "model": "FullyReplicated"}
    told = submit_wrongly(capsys, *IN_S3, *words, "--sharded", "model")
    assert "Channel model uses S3DistributionType=ShardedByS3Key, and every host needs all" in told
    told = submit_wrongly(capsys, "--channels", '{"train": "s3://bucket/rows"}', "--fast_file", '["train", "test"]')
    assert "fast_file names 'test', which is no channel of this job" in told
    assert "fast_file names 'train', and s3://bucket/rows is no folder: end its prefix with a slash" in told


def test_a_budget_needs_a_model_that_is_readable_here(aws, capsys):
    assert "--max-dollars cannot be kept, since the model is in S3" in submit_wrongly(
        capsys, *IN_S3, "--max-dollars", "9"
    )


def submit_wrongly(capsys, *words, file=None):
    code = run_command(["submit", *([str(file)] if file else []), *OPTIONS, "--instance_type", "ml.g6.2xlarge", *words])
    assert code == 1
    return capsys.readouterr().err


def test_all_mistakes_are_told_at_once_and_nothing_is_asked_of_aws(aws, tmp_path, capsys):
    file = tmp_path / "job.yaml"
    file.write_text("lora_r: 0\nlearning_rte: 1\nmodel_id: /home/me/model\njob: {spot: true, max_wait_seconds: 9}\n")
    told = submit_wrongly(capsys, *IN_S3, "--instance_cunt", "2", file=file)
    assert "'learning_rte' is not a setting" in told
    assert "the nearest valid name is 'instance_count'" in told
    file.write_text("lora_r: 0\nmodel_id: /home/me/model\njob: {spot: true, max_wait_seconds: 9}\n")
    told = submit_wrongly(capsys, *IN_S3, file=file)
    assert "lora_r='0' is not valid" in told
    assert "model_id='/home/me/model' is on this machine" in told
    assert "max_wait_seconds=9 is less than max_run_seconds=86400" in told
    assert aws.requests == []


def test_an_interruption_without_checkpoints_is_warned_of(aws, capsys):
    aws.furnish()
    words = ["--instance_type", "ml.g6.2xlarge", "--spot", "--use_checkpoints", "false", "--dry-run"]
    assert run_command(["submit", *OPTIONS, *IN_S3, *words]) == 0
    printed = capsys.readouterr()
    assert "Warning: spot=true with use_checkpoints=false" in printed.err
    assert "CheckpointConfig" not in json.loads(printed.out)


def test_no_secret_reaches_the_request(aws, tmp_path, capsys):
    told = submit_wrongly(capsys, *IN_S3, "--token", HUB_TOKEN)
    assert "token holds a secret" in told and HUB_TOKEN not in told
    (tmp_path / "data/config").mkdir(parents=True)
    (tmp_path / "data/config/args.yaml").write_text(f"wandb_token: {HUB_TOKEN}\n")
    told = submit_wrongly(capsys, *IN_S3, "--data-dir", str(tmp_path / "data"))
    assert "wandb_token holds a secret" in told and HUB_TOKEN not in told
    assert aws.requests == []


def test_a_job_without_data(aws, tmp_path, capsys):
    assert "give channel train" in submit_wrongly(capsys, "--model_id", "Qwen/Qwen3-0.6B")
    assert "is not there" in submit_wrongly(capsys, "--channels", '{"train": "nowhere"}')
    (tmp_path / "data/my rows").mkdir(parents=True)
    (tmp_path / "data/.cache").mkdir()
    told = submit_wrongly(capsys, "--data-dir", str(tmp_path / "data"))
    assert "Channel 'my rows' is none for SageMaker" in told and ".cache" not in told
    with pytest.raises(SystemExit):
        run_command(["submit", *OPTIONS, "--data-dir", str(tmp_path / "nowhere")])
    assert "is no folder on this machine" in capsys.readouterr().err
    assert aws.requests == []


def test_a_refusal_of_aws_is_one_sentence(aws, capsys):
    aws.furnish()
    quota = "The account-level service limit 'ml.g6.2xlarge for training job usage' is 0 Instances, with current"
    aws.refuse("CreateTrainingJob", "ResourceLimitExceeded", quota)
    told = submit_wrongly(capsys, *IN_S3)
    assert "The quota 'ml.g6.2xlarge for training job usage'" in told
