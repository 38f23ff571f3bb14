# SPDX-License-Identifier: Apache-2.0
"""A plan imports torch only when its options are right, and never what the job has no use for."""

import os
import subprocess
import sys

import pytest
from transformers import LlamaConfig

from support.adapted_models import SIZES

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
