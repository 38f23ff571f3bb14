# SPDX-License-Identifier: Apache-2.0
"""A restarted job goes on with its run; tests/integration/test_tracking.py writes runs."""

from llm_trainer.trackers.wandb import choose_run_id

ARN = "arn:aws:sagemaker:eu-west-1:123456789012:training-job/trial"


def test_a_training_job_has_one_id_and_others_have_new_ones():
    assert choose_run_id({"arn": ARN}) == choose_run_id({"arn": ARN}) != choose_run_id({"arn": f"{ARN}-2"})
    assert choose_run_id({"arn": None}) != choose_run_id({"arn": None})
    assert len(choose_run_id({})) == len(choose_run_id({"arn": ARN})) == 16
