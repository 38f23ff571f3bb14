# SPDX-License-Identifier: Apache-2.0
"""A job whose secrets are elsewhere: read once, used by the workers, and written nowhere."""

import os
import re

import pytest

from support.fake_aws import FakeAWS
from support.fake_hub import MODEL, FakeHub

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
