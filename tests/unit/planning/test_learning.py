# SPDX-License-Identifier: Apache-2.0
"""What jobs took counts for their instance type and model, less surely for their GPU, and for no other."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from llm_trainer.common.errors import UserError
from llm_trainer.planning.instances import read_instances
from llm_trainer.planning.learning import Learnt, learn
from llm_trainer.planning.run_time import PULL_SECONDS, RunTime
from llm_trainer.planning.step_time import StepTime
from support.planned_jobs import outline_job

TYPES = read_instances().types
STEP = StepTime(1.0, 0.1, 0.2, 0.5, 2.0, is_traced=True)


@pytest.fixture(scope="module")
def shape():
    return outline_job().fitter.job.shape


def write_manifest(folder, shape, *, seconds=2.2, **changes):
    compared = {
        "instance_type": "ml.g5.xlarge",
        "gpu": "A10G",
        "planned": {"step_seconds": 1.1, "start_seconds": 100.0},
        "actual": {"step_seconds": seconds, "start_seconds": 150.0},
    }
    manifest = {"parameters": shape.count_weights(), "trainable_parameters": shape.num_trained, **changes}
    folder.mkdir()
    file = folder / "training_manifest.json"
    file.write_text(json.dumps({"planned_and_actual": compared, **manifest}))
    return str(file)


def test_a_job_teaches_its_own_type_most(tmp_path, shape):
    learnt = learn([write_manifest(tmp_path / "job", shape)])
    same = learnt.correct_step(STEP, TYPES["ml.g5.xlarge"], shape)
    assert same.seconds == pytest.approx(2 * STEP.seconds)
    like = learnt.correct_step(STEP, TYPES["ml.g5.12xlarge"], shape)
    assert like.seconds == same.seconds
    assert STEP.high > like.high / like.low > same.high / same.low
    assert learnt.correct_step(STEP, TYPES["ml.p4d.24xlarge"], shape) is STEP
    assert Learnt().correct_step(STEP, TYPES["ml.g5.xlarge"], shape) is STEP


def test_what_counts_and_what_does_not_is_told(tmp_path, shape):
    files = [write_manifest(tmp_path / str(seconds), shape, seconds=seconds) for seconds in (1.1, 3.3)]
    assert list(learn(files[:1]).describe()) == ["--learn: a job on A10G took 1.00 of the planned time of a step."]
    learnt = learn(files)
    assert list(learnt.describe()) == ["--learn: 2 jobs on A10G took 2.00 of the planned time of a step."]
    assert list(learnt.find_warnings()) == []
    on_cpu = Learnt((replace(learnt.lessons[0], instance_type="this machine", gpu="CPU"),))
    assert list(on_cpu.describe()) == []
    (told,) = on_cpu.find_warnings()
    assert told == "--learn: a job ran on CPU, which no planned instance type has: its times do not count here."


def test_of_several_jobs_the_middle_one_counts(tmp_path, shape):
    files = [write_manifest(tmp_path / str(seconds), shape, seconds=seconds) for seconds in (1.1, 2.2, 11.0)]
    assert learn(files).correct_step(STEP, TYPES["ml.g5.xlarge"], shape).seconds == pytest.approx(2 * STEP.seconds)


def test_a_start_is_learnt_for_its_own_type(tmp_path, shape):
    learnt, run = (
        learn([write_manifest(tmp_path / "job", shape)]),
        RunTime(PULL_SECONDS + 60.0, 100.0, 0.0, 1.0, 5.0, 120.0, 300.0),
    )
    corrected = learnt.correct_start(run, TYPES["ml.g5.xlarge"])
    assert corrected.start == pytest.approx(PULL_SECONDS + 90.0)  # all but the image's pull, which no job sees
    assert corrected.seconds == pytest.approx(run.seconds + 30.0)
    assert learnt.correct_start(run, TYPES["ml.g5.12xlarge"]) is run


def test_manifests_may_lie_under_other_names_in_one_folder(tmp_path, shape):
    files = [Path(write_manifest(tmp_path / str(seconds), shape, seconds=seconds)) for seconds in (1.1, 2.2)]
    kept = [shutil.copy(file, tmp_path / f"job-{number}.json") for number, file in enumerate(files)]
    assert [lesson.step_share for lesson in learn(map(str, kept)).lessons] == pytest.approx([1.0, 2.0])


def test_manifests_that_teach_nothing_are_told_at_once(tmp_path, shape):
    files = [
        str(tmp_path / "nowhere/training_manifest.json"),
        write_manifest(tmp_path / "old", shape, planned_and_actual=None),
        write_manifest(tmp_path / "short", shape, seconds=None),
        write_manifest(tmp_path / "damaged", shape, parameters="many"),
        write_manifest(tmp_path / "odd", shape, seconds=-1.0),
    ]
    cut = tmp_path / "cut.json"
    cut.write_text('{"planned')
    files.append(str(cut))
    with pytest.raises(UserError) as raised:
        learn(files)
    assert [problem.partition(": ")[0] for problem in raised.value.problems] == [f"--learn {file}" for file in files]
