# SPDX-License-Identifier: Apache-2.0
"""Each room gets what it needs: the job and the whole settings go to few files. tests/support/rooms.py counts them."""

import pytest

from support import rooms

# Of commit 43a04bb, before the packages: `python tests/support/rooms.py FOLDER` on its code/llm_trainer.
BASELINE = {"naming_files": 43, "files": 30, "returns": 26, "climbs": 37, "names": 130}

CODE = {
    "train": """
from llm_trainer.job import Job
from llm_trainer.model import load, plan
from llm_trainer.holder import Holder

def train(job: Job) -> None:
    settings, inputs = job.settings, job.inputs
    plan(settings)
    Holder(job, 1)
    load(settings)
    load(settings.max_length)
""",
    "job": """
from llm_trainer.settings import Settings

class Job:
    settings: Settings
""",
    "settings": "class Settings:\n    max_length: int\n",
    "model": """
from llm_trainer.settings import Settings
from llm_trainer.shape import read

def plan(settings: "Settings | None") -> None:
    read(settings)
    measure(1)

def measure(length: int) -> None: ...
def load(settings: Settings) -> None: ...
""",
    "shape": "from llm_trainer.settings import Settings\n\ndef read(whole: Settings) -> None: ...\n",
    "holder": """
from llm_trainer.job import Job

class Holder:
    def __init__(self, job: Job, number: int) -> None:
        self.kept = job
        self.number = number

    def use(self) -> int:
        return self.kept.settings.max_length
""",
}


def test_the_job_is_followed_through_its_calls(tmp_path):
    folder = tmp_path / "llm_trainer"
    folder.mkdir()
    for name, content in CODE.items():
        (folder / f"{name}.py").write_text(content)
    journey = rooms.follow_job(rooms.read_code(folder))
    names = ["train", "model", "shape", "holder", "model", "model"]
    assert journey.entered == [f"llm_trainer/{name}.py" for name in names]
    assert journey.depths == [0, 1, 2, 1, 1, 1]
    assert journey.names == {
        *("llm_trainer/train.py:train:job", "llm_trainer/train.py:train:settings"),
        *("llm_trainer/model.py:plan:settings", "llm_trainer/model.py:load:settings"),
        "llm_trainer/shape.py:read:whole",
        *("llm_trainer/holder.py:Holder.__init__:job", "llm_trainer/holder.py:Holder.__init__:self.kept"),
        "llm_trainer/holder.py:Holder.use:self.kept",
    }
    assert rooms.count(folder) == {"naming_files": 6, "files": 4, "returns": 1, "climbs": 1, "names": 8}


@pytest.mark.parametrize("figure", ["files", "returns", "climbs", "names"])
def test_the_job_goes_less_than_half_as_far_as_before(figure):
    assert rooms.count()[figure] < BASELINE[figure] / 2


def test_a_third_of_the_files_name_the_whole_settings():
    assert rooms.count()["naming_files"] <= BASELINE["naming_files"] / 3
