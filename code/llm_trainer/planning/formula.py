# SPDX-License-Identifier: Apache-2.0
"""The memory of a step by formula, for a model whose code does not run on tensors without numbers."""

from llm_trainer.model.memory.estimate import Estimate, Setup, count_optimizer_states, count_process_bytes
from llm_trainer.model.memory.passes import count_gathered_bytes
from llm_trainer.model.memory.scenario import MemoryScenario, ParallelismPlan

# Bytes for each number of a token's hidden state: what a layer keeps for its backward pass in 16 bit where attention
# stores no scores, and its input alone (Korthikanti et al. 2022, arXiv:2205.05198, section 4).
LAYER_BYTES, INPUT_BYTES = 34, 2


def estimate_by_formula(scenario: MemoryScenario, plan: ParallelismPlan) -> Estimate:
    """Return what each device needs for a step in this way. Raise UnknownShapeError where the parts are not known."""
    shape, training, target = scenario.shape, scenario.settings.training, scenario.target
    shards = target.world_size if plan.sharded else 1
    units = [count_gathered_bytes(layer, scenario.dtypes[1], shards) for layer in shape.list_layers()]
    numbers = scenario.batch.num_tokens * scenario.config.get_text_config().hidden_size
    kept = INPUT_BYTES if plan.recompute_activations else LAYER_BYTES
    parts = {
        "weights": shape.count_bytes() // shards,
        "gathered weights": 2 * max(units) if shards > 1 else 0,
        "gradients": shape.trained_bytes // shards,
        "optimizer": count_optimizer_states(shape, training.optim) // shards,
        "activations": 0 if plan.offload_activations else numbers * kept * shape.num_layers,
        "working memory": numbers * LAYER_BYTES,
    }
    setup = Setup(scenario.build_step(plan), target.world_size, training.optim, accumulates=False)
    host_bytes = numbers * kept * shape.num_layers if plan.offload_activations else 0
    return Estimate(parts, count_process_bytes(setup, sum(parts.values())), host_bytes)
