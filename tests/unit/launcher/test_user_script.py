# SPDX-License-Identifier: Apache-2.0
"""When a job is a script of the user's, and what of its last lines tells why it failed."""

import pytest

from llm_trainer.launcher.user_script import PYTHON_ERROR, names_a_script


@pytest.mark.parametrize(
    ("hyperparameters", "expected"),
    [
        ({"sagemaker_program": "train.py"}, True),
        ({"sagemaker_program": '"train.py"'}, True),
        ({"sagemaker_submit_directory": '"s3://bucket/sourcedir.tar.gz"'}, False),
        ({"sagemaker_program": "null"}, False),
        ({}, False),
    ],
)
def test_a_job_with_a_program_names_a_script(hyperparameters, expected):
    assert names_a_script(hyperparameters) is expected


def test_a_script_that_calls_our_training_does_not_run_itself_again(monkeypatch):
    monkeypatch.setenv("SM_USER_ENTRY_POINT", "train.py")
    assert not names_a_script({"sagemaker_program": "train.py"})


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("KeyError: 'a'\n\nDuring handling of it:\n\nmine.BadRow: x\nValueError: no rows\n", "ValueError: no rows"),
        (
            "[rank1]: OSError: disk full\ntorch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====\n",
            "OSError: disk full",
        ),
        ("python: can't open file '/x/trian.py': [Errno 2]\n", "python: can't open file '/x/trian.py': [Errno 2]"),
    ],
    ids=["last-of-a-chain", "torchrun", "no-script"],
)
def test_the_last_error_of_a_log_is_found(lines, expected):
    assert PYTHON_ERROR.findall(lines)[-1] == expected
