# SPDX-License-Identifier: Apache-2.0
"""The training methods, one module each: the trainer, the rows that it takes, and what it logs.

docs/architecture.md tells how to add one. `choose_method` is the only place that chooses one.
"""

from importlib import import_module

from llm_trainer.config.sections import METHOD_FORMATS
from llm_trainer.training.methods.training_method import TrainingMethod

__all__ = ["TrainingMethod", "choose_method"]


def choose_method(name: str = "sft") -> TrainingMethod:
    """Return the training method of that name. Raises KeyError for one that does not exist.

    Its module alone is imported: TRL's trainers import libraries, such as bitsandbytes, that other methods do without.
    """
    if name not in METHOD_FORMATS:
        raise KeyError(name)
    method: TrainingMethod = getattr(import_module(f"{__name__}.{name}"), name.upper())
    return method
