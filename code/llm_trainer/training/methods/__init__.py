# SPDX-License-Identifier: Apache-2.0
"""The training methods, one module each: the trainer, the rows that it takes, and what it logs.

docs/architecture.md tells how to add one. `choose_method` is the only place that chooses one.
"""

from llm_trainer.training.methods.distill import DISTILL
from llm_trainer.training.methods.dpo import DPO
from llm_trainer.training.methods.grpo import GRPO
from llm_trainer.training.methods.kto import KTO
from llm_trainer.training.methods.reward import REWARD
from llm_trainer.training.methods.rloo import RLOO
from llm_trainer.training.methods.sft import SFT
from llm_trainer.training.methods.training_method import TrainingMethod

__all__ = ["METHODS", "TrainingMethod", "choose_method"]

METHODS = {method.name: method for method in (SFT, DPO, KTO, REWARD, DISTILL, GRPO, RLOO)}


def choose_method(name: str = SFT.name) -> TrainingMethod:
    """Return the training method of that name. Raises KeyError for one that does not exist."""
    return METHODS[name]
