# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer plan`: how a job's model would be loaded and computed, and what that takes on a GPU.

The model's config.json is enough: neither data nor weights nor a GPU are needed. `validate` tells all the rest.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_trainer.cli.gpu_memory import examine_batch, examine_memory
from llm_trainer.cli.validation import Validation, collect_findings, print_validation
from llm_trainer.common.errors import UserError
from llm_trainer.config.environment import read_environment
from llm_trainer.config.schema import Settings
from llm_trainer.job.earlier_adapter import find_adapter
from llm_trainer.job.inputs import Inputs, find_model
from llm_trainer.job.job import Job, collect_settings, fetch_earlier_adapter
from llm_trainer.launcher.worker_processes import build_library_variables

if TYPE_CHECKING:
    from llm_trainer.model.plan import ModelPlan

USUAL_ROW_TOKENS = 1024  # where max_length=null sets no limit


def plan(words: Sequence[str], as_json: bool) -> int:
    """Print what is planned for the model, and return the exit code: 1 when it cannot be trained so."""
    return print_validation(lambda in_colour: examine_model(words), as_json)


def examine_model(words: Sequence[str]) -> Validation:
    """Return how the model would be loaded with the settings of these words. Sets environment variables."""
    return collect_findings(lambda validation: examine_loading(words, validation))


def examine_loading(words: Sequence[str], validation: Validation) -> None:
    """Add how the model would be loaded with the settings of these words. Sets environment variables."""
    try:
        environment = read_environment()
        settings, problems = collect_settings(environment, words)
    except UserError as error:
        validation.add_findings("tree", "error", error.problems)
        return
    examine_batch(settings, environment, validation)
    name, missing = find_model(settings.model, environment, needs_tokenizer=False)
    adapter, faults = find_adapter(settings.adapter, environment)
    if problems or missing or faults:
        validation.add_findings("settings", "error", [*problems, *missing, *faults])
        return
    inputs = Inputs(name, [], [], environment.model_dir, environment.model_dir, adapter)
    try:
        planned, settings = plan_loading(Job(environment, settings, inputs))
    except UserError as error:
        validation.add_findings("model", "error", error.problems)
        return
    validation.add_findings("model", "ok", [name, *planned.reasons])
    longest_row = settings.data.max_length or USUAL_ROW_TOKENS
    validation.add_findings("memory", "ok", [f"for rows of {longest_row} tokens, which data may stay below"])
    examine_memory(planned.config, settings, environment, longest_row, validation)


def plan_loading(job: Job) -> "tuple[ModelPlan, Settings]":
    """Return how the model of a job would be loaded, and the settings with what an earlier adapter tells.

    Raises UserError where it cannot be loaded.
    """
    settings, inputs = job.settings, job.inputs
    os.environ.update(build_library_variables(inputs, settings.model.chat_template_path, settings.output.push_to_hub))
    from llm_trainer.model import loading  # Transformers has to find the variables set
    from llm_trainer.model.device import find_device
    from llm_trainer.model.plan import PlanSettings, plan_model
    from llm_trainer.model.positions import bound_length
    from llm_trainer.model.precision import choose_precision

    with tempfile.TemporaryDirectory(prefix="llm-trainer-") as scratch_dir:
        settings = fetch_earlier_adapter(job, Path(scratch_dir)).settings
        folder = loading.fetch_model(inputs.model, settings.model, Path(scratch_dir), with_weights=False)
        device = find_device(settings.parallelism.use_cpu)
        precision = choose_precision(settings.model, settings.adapter, device)
        sections = PlanSettings(settings.model, settings.adapter, settings.parallelism, settings.output)
        planned = plan_model(folder, sections, device, precision)
        data = bound_length(settings.data, planned.num_positions)
        return planned, settings.model_copy(update={"data": data})
