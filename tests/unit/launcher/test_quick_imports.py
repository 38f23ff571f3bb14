# SPDX-License-Identifier: Apache-2.0
"""Packages that a job has no use for are not imported with the rest, and can be imported later."""

import subprocess
import sys

import pytest

from llm_trainer.launcher.quick_imports import hide_packages

# In a process of its own, as a package that was imported before stays.
PROGRAM = """
import gc, importlib.util, sys
from llm_trainer.config.sections import MethodSettings, ModelSettings
from llm_trainer.launcher.quick_imports import import_quickly, leave_out_bitsandbytes

def find(): return [name for name in ("scipy", "bitsandbytes") if importlib.util.find_spec(name)]
before = find()
model = ModelSettings(**{settings})
with leave_out_bitsandbytes((model, MethodSettings()), {optim!r}, {folder!r}, ""), import_quickly(model):
    print([name for name in before if name not in find()], gc.isenabled())
assert find() == before and gc.isenabled() and gc.get_freeze_count()
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def list_hidden(folder, optim="adamw_torch", **settings):
    program = PROGRAM.format(settings=settings, optim=optim, folder=str(folder))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_needless_packages_are_hidden_while_nothing_is_searched_for_garbage(folder):
    pytest.importorskip("bitsandbytes")
    assert list_hidden(folder) == "['scipy', 'bitsandbytes'] False"


def test_a_package_that_may_be_needed_is_there(folder):
    pytest.importorskip("bitsandbytes")
    assert list_hidden(folder, load_in_4bit=True) == "['scipy'] False"
    assert list_hidden(folder, optim="paged_adamw_8bit") == "['scipy'] False"
    assert list_hidden(folder / "elsewhere", trust_remote_code=True) == "[] False"
    (folder / "config.json").write_text('{"quantization_config": {}}')
    assert list_hidden(folder) == "['scipy'] False"


def test_a_model_in_mxfp4_needs_no_bitsandbytes(folder):
    pytest.importorskip("bitsandbytes")
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "mxfp4"}}')
    assert list_hidden(folder) == "['scipy', 'bitsandbytes'] False"


def test_a_package_stays_hidden_to_the_end_of_the_outer_block():
    with hide_packages("wave"):
        with hide_packages("wave"):
            pass
        assert sys.modules["wave"] is None
    assert "wave" not in sys.modules
