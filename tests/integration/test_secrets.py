# SPDX-License-Identifier: Apache-2.0
"""A job whose secrets are elsewhere: read once, used by the workers, and written nowhere."""

import base64
import json
import os
import re
import subprocess
from pathlib import Path
from urllib.parse import quote, quote_plus

import pytest

from support.fake_aws import FakeAWS
from support.fake_hub import MODEL, FakeHub
from support.holding import hold_function
from support.sagemaker_tree import LLM_TRAINER, ROWS
from support.waiting import GUARD_SECONDS

pytestmark = pytest.mark.long

SECRET = "arn:aws:secretsmanager:eu-west-1:111122223333:secret:hub-AbCdEf"
PARAMETER = "arn:aws:ssm:eu-west-1:111122223333:parameter/wandb"
# Run by every Python process that finds it on its path: each worker leaves what it finds in the environment.
RECORD_VARIABLES = """
import os, pathlib
if "RANK" in os.environ:
    names = ("HF_TOKEN", "WANDB_API_KEY")
    pathlib.Path("{file}").write_text(" ".join(os.environ.get(name, "none") for name in names))
"""


def test_two_workers_use_what_the_launcher_read_once_and_nothing_holds_it(tree, tiny_model, tmp_path):
    aws, hub = FakeAWS(), FakeHub(tiny_model)
    aws.values = {SECRET: '{"HF_TOKEN": "hf_behindTheReference"}', PARAMETER: "key-behind-the-parameter"}
    found = tmp_path / "found"
    (tmp_path / "sitecustomize.py").write_text(RECORD_VARIABLES.format(file=found))
    tree.environment |= {
        **aws.variables,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "WANDB_API_KEY": PARAMETER,
        "WANDB_MODE": "offline",
        "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
        "SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY": str(tree.base_dir / "cache"),
    }
    tree.write_job({"model_id": MODEL, "token": SECRET, "nproc_per_node": "2", "max_steps": "1"}, ("train",))
    result = tree.run()
    assert result.returncode == 0, result.stdout
    assert aws.requests == [SECRET, PARAMETER]
    assert found.read_text() == "hf_behindTheReference withheld"  # only the reporter has a use for W&B's key
    assert "Bearer hf_behindTheReference" in hub.tokens
    assert not re.search("hf_behind|key-behind", result.stdout)
    files = [file for file in tree.base_dir.rglob("*") if file.is_file()]
    assert any(file.name == "metrics.jsonl" for file in files)
    for file in files:
        assert not re.search(rb"hf_behind|key-behind|of-the-test", file.read_bytes()), file
    hub.close()
    aws.server.shutdown()


def test_a_reference_that_may_not_be_read_fails_the_job_at_once(tree):
    aws = FakeAWS()
    aws.refusals[SECRET] = "AccessDeniedException"
    tree.environment |= {**aws.variables, "HF_TOKEN": SECRET}
    result = tree.run()
    aws.server.shutdown()
    assert result.returncode == 1
    assert tree.failure == (
        f"HF_TOKEN refers to {SECRET}, which may not be read: allow the job's role secretsmanager:GetSecretValue, and "
        "kms:Decrypt where your own key encrypts it."
    )
    assert "Traceback" not in result.stdout


# Secrets of all shapes, by the place where a job is given them.
CANARIES = {
    "HF_TOKEN": "hf_Canary0123456789abcdefghijklmnopqrs",
    "HUGGING_FACE_HUB_TOKEN": "hf_Older-0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "MLFLOW_TRACKING_TOKEN": "canary/of+mlflow==",
    "AWS_SECRET_ACCESS_KEY": "Canary/K7MDENG+bPxRfiCYEXAMPLEKEY",
    "AWS_SESSION_TOKEN": "IQoJb3JpZ2luX2VjE-canary//////////w==",
    "MY_API_KEY": 'quoted"canary\\and more',
    "hyperparameter": "hf_canaryOfHyperparameters",
    "model_init_kwargs": "canary-of-kwargs-1",
    "YAML": "canary: of 'yaml' 1",
    "password": "canary@word/1",
    "signature": "canaryOfASignature1234",
}


def spell(secret: str) -> set[bytes]:
    """A secret as it could be found in a file."""
    plain = {secret, quote(secret), quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1]}
    encoded = {base64.b64encode(bytes(offset) + secret.encode()).decode()[4:-4] for offset in range(3)}
    return {re.sub(r"\s", "", form).encode() for form in plain | encoded}


def find_leaks(content: bytes) -> list[str]:
    """The places of the secrets that a text holds, with its line breaks or without."""
    joined = re.sub(rb"(?:\s|\\\\[nr])+", b"", content)
    return [place for place, secret in CANARIES.items() if any(form in joined for form in spell(secret))]


def plant_canaries(tree, folder: Path) -> None:
    """Give a job a secret in each of its inputs, and files of its working folder that would run as libraries."""
    tree.environment |= {name: f"{secret}\n" for name, secret in CANARIES.items() if name.isupper() and name != "YAML"}
    tree.environment |= {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tree.base_dir}/output/data/mlflow.db",
        "SAGEMAKER_MANAGED_WARMPOOL_CACHE_DIRECTORY": str(tree.base_dir / "cache"),
        "TMPDIR": str(tree.base_dir / "tmp"),
        "TRAINING_JOB_NAME": f"job; eval_loss=0.0001 {CANARIES['MY_API_KEY']}",
        "CANARY_URL": f"https://me:{CANARIES['password']}@host/x?X-Amz-Signature={CANARIES['signature']}",
    }
    (tree.base_dir / "tmp").mkdir()
    # A worker has no use for the keys of trackers and of AWS, is not given them, and cannot know them in a row.
    known = " ".join(secret for name, secret in CANARIES.items() if name == "MY_API_KEY" or not name.isupper())
    bad = [f'{{"messages": "{CANARIES["signature"]}', json.dumps({"messages": known, "a": 1}), json.dumps(known)]
    forged = {"text": f"x\n; eval_loss=0.0001\n\u001b[31m {known}"}
    rows = [{"messages": [{"role": "user", "content": forged["text"]}, *ROWS[0]["messages"][1:]]}, *ROWS]
    tree.write("input/data/train/train.jsonl", "\n".join([*map(json.dumps, rows), *bad]))
    tree.write("input/data/config/args.yaml", f"hub_token: {json.dumps(CANARIES['YAML'])}\n")
    tree.change(
        max_steps="2",
        eval_strategy="no",
        token=CANARIES["hyperparameter"],
        model_init_kwargs=json.dumps({"token": CANARIES["model_init_kwargs"]}),
        max_bad_rows_fraction="0.5",
        run_name=f"run; eval_loss=0.0001 {tree.environment['CANARY_URL']}",
        report_to="mlflow,wandb,tensorboard",
    )
    for name in ("peft", "wandb", "mlflow", "psutil", "usercustomize"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('shadow of {name}')")


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_no_secret_of_any_shape_is_in_anything_that_a_job_leaves(tree, tmp_path, fails):
    plant_canaries(tree, tmp_path)
    if fails:  # in the worker, with a library's words about what the user gave
        tree.change(model_init_kwargs=json.dumps({"token": CANARIES["model_init_kwargs"], CANARIES["YAML"]: 1}))
    # A job that fails at once would end before the trackers' libraries have begun, on a busy machine.
    begun = ":".join(f"{tree.base_dir}/output/data/{file}" for file in ("wandb/**/*.wandb", "mlflow.db"))
    python_path = os.environ.get("PYTHONPATH", "")
    tree.environment |= hold_function(tmp_path / "held", python_path, "llm_trainer.train:prepare", begun)
    variables = {**os.environ, "SAGEMAKER_BASE_DIR": str(tree.base_dir), **tree.environment}
    result = subprocess.run(
        [str(LLM_TRAINER), "train"], env=variables, cwd=tmp_path, capture_output=True, timeout=GUARD_SECONDS
    )
    printed = result.stdout + result.stderr
    assert result.returncode == int(fails), printed.decode()
    assert find_leaks(printed) == []
    assert b"HOLDING prepare" in printed
    assert b"shadow" not in printed
    assert b"\x1b" not in printed
    assert not re.search(rb"(?m)(?:^|; )eval_loss=[0-9]", printed)
    inputs = tree.base_dir / "input"
    files = [file for file in tree.base_dir.rglob("*") if file.is_file() and inputs not in file.parents]
    names = {file.name for file in files}
    assert {"metrics.jsonl", "report.html", "mlflow.db"} <= names
    assert fails or {"README.md", "training_manifest.json", "rejected_rows.jsonl"} <= names
    assert any(file.suffix == ".wandb" for file in files)
    assert {str(file): leaks for file in files if (leaks := find_leaks(file.read_bytes()))} == {}
