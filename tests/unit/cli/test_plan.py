# SPDX-License-Identifier: Apache-2.0
"""A plan imports torch only when its options are right, and never what the job has no use for."""

import os
import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from transformers import LlamaConfig

from llm_trainer.cli.plan import draw_images, examine_model, find_time_warnings
from llm_trainer.cli.plan_instances import PlanOptions
from llm_trainer.config.schema import Settings
from support.adapted_models import SIZES
from support.tiny_image_models import build_tiny_config

# In a process of its own, as a package that was imported before stays.
PROGRAM = """
import sys
from llm_trainer.cli.plan import examine_model
from llm_trainer.cli.plan_instances import NO_OPTIONS, read_basis
from llm_trainer.cli.validation import Validation
assert read_basis(NO_OPTIONS, Validation()) and "torch" not in sys.modules
planned = examine_model(["--model_id", {folder!r}])
assert planned.instances["cheapest"] and not planned.list_texts("error")
print([name for name in ("bitsandbytes", "scipy") if name in sys.modules])
"""


def test_a_plan_imports_no_package_that_its_job_has_no_use_for(tmp_path):
    pytest.importorskip("bitsandbytes")
    LlamaConfig(architectures=["LlamaForCausalLM"], **SIZES).save_pretrained(tmp_path)
    places = {"SAGEMAKER_BASE_DIR": str(tmp_path), "LLM_TRAINER_CACHE": str(tmp_path)}
    code = PROGRAM.format(folder=str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **places}, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.fixture
def plan_writing(tmp_path, monkeypatch):
    """Plans a job whose model writes completions of 100 prompts."""
    LlamaConfig(architectures=["LlamaForCausalLM"], **SIZES).save_pretrained(tmp_path)
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path))
    words = ["--model_id", str(tmp_path), "--method=grpo", '--reward_functions=["exact_match"]', "--max_length=64"]

    def plan(*more, tokens_per_row=50):
        with patch.dict(os.environ):
            options = PlanOptions(rows=100, tokens_per_row=tokens_per_row, places=(("ml.g5.xlarge", 1),))
            return examine_model([*words, *more], options)

    return plan


def test_a_plan_tells_the_time_of_a_job_whose_model_writes(plan_writing):
    short, long = (plan_writing(f"--max_completion_length={tokens}") for tokens in (16, 64))
    hours = [planned.instances["instances"][0]["hours_at_most"] for planned in (short, long)]
    assert 0 < hours[0] < hours[1]
    assert short.instances["instances"][0]["steps"] == 300  # three epochs of a group a step
    assert any("max_completion_length=16 tokens long" in text for text in short.list_texts("warning"))


def test_a_plan_without_a_prompt_that_fits_tells_the_bound(plan_writing):
    (problem,) = plan_writing(tokens_per_row=65).list_texts("error")
    assert problem.startswith("--tokens-per-row=65 is above max_length=64")


def test_the_time_of_vllm_is_not_told():
    (told,) = find_time_warnings(Settings(method="grpo", use_vllm=True))
    assert "no time and no price is told" in told
    assert not list(find_time_warnings(Settings()))


@pytest.mark.parametrize("trusts", [True, False])
def test_a_processor_of_its_own_code_draws_images_where_that_is_trusted(trusts):
    planned = SimpleNamespace(config=build_tiny_config("smolvlm"), folder="base")
    with patch("llm_trainer.data.images.row_images.draw_row_images") as draw:
        draw_images(PlanOptions(images_per_row="2x64x32"), planned, Settings(trust_remote_code=trusts))
    number, size, images = draw.call_args.args
    assert (number, size, images.folder, images.trust_remote_code) == (2, (64, 32), "base", trusts)
