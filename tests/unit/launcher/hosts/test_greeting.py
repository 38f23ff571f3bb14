# SPDX-License-Identifier: Apache-2.0
"""The key of a job is the same on its hosts, and another one for another job. Attacks: test_cluster.py."""

import pytest

from llm_trainer.launcher.hosts.greeting import derive_key

HOSTS = ["algo-1", "algo-2"]
JOB = {"TRAINING_JOB_NAME": "job", "TRAINING_JOB_ARN": "arn:aws:sagemaker:::job", "HF_TOKEN": "hf_secret"}


def test_hosts_of_a_job_have_one_key_whatever_else_differs():
    assert derive_key(HOSTS, JOB | {"HOSTNAME": "one"}) == derive_key(tuple(HOSTS), JOB | {"HOSTNAME": "other"})
    assert derive_key(HOSTS, {}) == derive_key(HOSTS, {})


@pytest.mark.parametrize("name", list(JOB))
def test_another_job_or_another_secret_is_another_key(name):
    assert derive_key(HOSTS, JOB) != derive_key(HOSTS, JOB | {name: "other"})
    assert derive_key(HOSTS, JOB) != derive_key([*HOSTS, "algo-3"], JOB)
