# SPDX-License-Identifier: Apache-2.0
"""A restarted job goes on with its run; tests/integration/test_tracking.py writes runs."""

import os
from types import SimpleNamespace

import pytest

from llm_trainer.readers.thumbnails import write_thumbnail
from llm_trainer.trackers.feed import TrackerUsageError
from llm_trainer.trackers.wandb import WandbTracker, choose_run_id
from support.journals import write_listed_result
from support.tiny_processors import draw

ARN = "arn:aws:sagemaker:eu-west-1:123456789012:training-job/trial"


def test_a_training_job_has_one_id_and_others_have_new_ones():
    assert choose_run_id({"arn": ARN}) == choose_run_id({"arn": ARN}) != choose_run_id({"arn": f"{ARN}-2"})
    assert choose_run_id({"arn": None}) != choose_run_id({"arn": None})
    assert len(choose_run_id({})) == len(choose_run_id({"arn": ARN})) == 16


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WANDB_PROJECT", "a/b", "Invalid project name 'a/b'"),
        ("WANDB_TAGS", "a" * 65, "run_tags: "),
        ("WANDB_MODE", "offlin", "mode: Input should be"),
        ("WANDB_API_KEY", "secret ", "API key cannot start or end with whitespace"),
    ],
)
def test_a_variable_that_wandb_refuses_is_refused_at_each_attempt(tmp_path, monkeypatch, name, value, words):
    for variable in [variable for variable in os.environ if variable.startswith("WANDB_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv(name, value)
    tracker = WandbTracker(None, tmp_path)
    for _ in range(2):  # W&B itself would write to a project named uncategorized the second time
        with pytest.raises(TrackerUsageError, match=words) as refusal:
            tracker.begin({"kind": "job", "time": 0.0, "settings": {}})
        assert "secret" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_only_the_result_becomes_an_artifact(tmp_path):
    tracker, sent = WandbTracker(None, tmp_path / "data"), []
    tracker.run = SimpleNamespace(id="1", log_artifact=sent.append)
    listed = write_listed_result(tmp_path)
    tracker.upload_model(tmp_path)
    assert sorted(sent[0].manifest.entries) == listed


@pytest.mark.parametrize("is_offline", [False, True])
def test_answers_become_a_table_with_images_once(tmp_path, is_offline):
    tracker, logged = WandbTracker(None, tmp_path), []
    tracker.run, tracker.started = SimpleNamespace(log=logged.append, offline=is_offline), 0.0
    image = {"name": "cat.png", "thumbnail": write_thumbnail(draw(40, 30))}
    texts = {"prompt": "What is it?", "before": "?", "after": "A cat."}
    tracker.send([{"time": 1.0, "kind": "generation", **texts, "images": [image]}])
    for _ in range(2):
        tracker.upload([])
    ((table, *beside),) = (each.values() for each in logged)
    assert table.columns == ["split", "prompt", "reference", "before", "after", *(() if is_offline else ("images",))]
    ((_, *found),) = table.data
    assert found[:4] == ["What is it?", "", "?", "A cat."]
    (shown,) = beside[0] if is_offline else found[4:]  # offline, W&B would keep it where no user finds it
    assert shown.image.size == (40, 30)
