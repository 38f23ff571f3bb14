# SPDX-License-Identifier: Apache-2.0
"""The training methods, one module each: the trainer, the rows that it takes, and what it logs.

How to add a training method, such as DPO:

1. Write `methods/dpo.py` with a class `ResumableDPOTrainer(ResumableMixin, DPOTrainer)`. Override there what the method
   does otherwise, and nothing of checkpoints, stops and resumes. The trainer has to count its tokens in
   `_total_train_tokens`, as TRL's trainers do.
2. Describe it in the same module by a `TrainingMethod`: trainer, config class, columns of a row, names of its metrics.
3. Enter it in `METHODS` below. `choose_method` is the only place that chooses one. A setting `method` belongs into
   `TrainingSettings`, and `train.prepare` passes it here.
4. Give `data/formats.py` the rows of the method, and `data/encoding.py` their tokens, where the columns differ. Switch
   packing off in `training/packing.py` where the rows cannot share sequences.
5. Define new metrics in `journal/metric_definitions.py`, from where SageMaker's definitions and the report take them.
6. Add a test that trains a tiny model, is stopped, and resumes to the very same weights.
"""

from llm_trainer.training.methods.sft import SFT
from llm_trainer.training.methods.training_method import TrainingMethod

__all__ = ["METHODS", "TrainingMethod", "choose_method"]

METHODS = {method.name: method for method in (SFT,)}


def choose_method(name: str = SFT.name) -> TrainingMethod:
    """Return the training method of that name. Raises KeyError for one that does not exist."""
    return METHODS[name]
