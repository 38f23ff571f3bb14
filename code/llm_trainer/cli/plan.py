# SPDX-License-Identifier: Apache-2.0
"""`llm-trainer plan`: how a job's model would be loaded and computed, and what that takes on a GPU.

From the model's config alone: neither data nor weights nor a GPU are needed. `validate` tells all the rest.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from llm_trainer.cli.validate import Validation, answer, examine_memory
from llm_trainer.common.errors import UserError
from llm_trainer.config.environment import read_environment
from llm_trainer.job.inputs import Inputs, find_model
from llm_trainer.job.job import collect_settings
from llm_trainer.launcher.worker_processes import build_library_variables

USUAL_ROW_TOKENS = 1024  # where max_length=null sets no limit


def plan(arguments: Sequence[str]) -> int:
    """Print what is planned; the exit code, 1 when the model cannot be trained so."""
    return answer(arguments, examine_model)


def examine_model(arguments: Sequence[str], in_colour: bool) -> Validation:
    validation = Validation()
    try:
        environment = read_environment()
        settings, problems = collect_settings(environment, arguments)
    except UserError as error:
        validation.tell("tree", "error", error.problems)
        return validation
    name, missing = find_model(settings.model, environment)
    if problems or missing:
        validation.tell("settings", "error", [*problems, *missing])
        return validation
    os.environ.update(
        build_library_variables(
            Inputs(name, [], [], environment.model_dir, environment.model_dir),
            settings.model.chat_template_path,
            settings.output.push_to_hub,
        )
    )
    from llm_trainer.model import loading  # Transformers has to find the variables set
    from llm_trainer.model.device import find_device
    from llm_trainer.model.plan import plan_model
    from llm_trainer.model.precision import choose_precision

    with tempfile.TemporaryDirectory(prefix="llm-trainer-") as scratch_dir:
        try:
            folder = loading.fetch_model(name, settings, Path(scratch_dir), with_weights=False)
            device = find_device(settings)
            planned = plan_model(folder, settings, device, choose_precision(settings, device))
        except UserError as error:
            validation.tell("model", "error", error.problems)
            return validation
    validation.tell("model", "ok", [name, *planned.reasons])
    longest_row = settings.data.max_length or USUAL_ROW_TOKENS
    validation.tell("memory", "ok", [f"for rows of {longest_row} tokens, which data may stay below"])
    examine_memory(planned.config, settings, environment, longest_row, validation)
    return validation
