# SPDX-License-Identifier: Apache-2.0
"""The seconds of a training step by a roofline: each pass takes what its operations and bytes take at a GPU's speed.

Products of matrices and attention are counted by `flops`. All that is read and written besides is counted by
`step_trace`, or by a formula for a model whose code does not run without numbers. `traffic` adds what GPUs exchange.
"""

from dataclasses import dataclass, replace

import torch

from llm_trainer.model.memory.flops import count_attention, count_products
from llm_trainer.model.memory.gpus import Gpu
from llm_trainer.model.memory.scenario import MemoryScenario, ParallelismPlan
from llm_trainer.model.memory.shape import UnknownShapeError
from llm_trainer.model.memory.step_trace import StepTrace, trace_step
from llm_trainer.planning.efficiency import Efficiency, find_efficiency
from llm_trainer.planning.instances import InstanceType
from llm_trainer.planning.traffic import Spread, count_traffic, time_waits

UPDATE_BYTES = 28  # AdamW reads weight, gradient and two states of 4 bytes, and writes all but the gradient
# Where no trace is: bytes for each number of a token's hidden state in a layer, forward and backward. A Llama of 8B
# with an adapter moves so many (bench/RESULTS.md, GPU).
FORMULA_BYTES = 100, 160
PCIE_BYTES = 25e9  # a second, of activations that wait in the host's memory: what PCIe 4.0 x16 reaches of 32


@dataclass(frozen=True)
class Pass:
    """Work of a GPU in a pass over a batch."""

    products: float  # operations
    attention: float  # operations
    moved: float  # bytes of its own memory, besides those of products
    offloaded: float  # bytes to or from the host's memory

    def time(self, rates: "Rates") -> float:
        """Return the seconds that it takes at these rates."""
        computing = self.products / rates.products + self.attention / rates.attention + self.moved / rates.moved
        return max(computing, self.offloaded / PCIE_BYTES)


@dataclass(frozen=True)
class Rates:
    """The work of a GPU in a second: operations of products and of attention, and bytes of its own memory."""

    products: float
    attention: float
    moved: float


def find_rates(gpu: Gpu, efficiency: Efficiency, scenario: MemoryScenario) -> Rates:
    """Return what a GPU does in a second in the type that the job computes in."""
    peak = gpu.fp32_flops if scenario.dtypes[1] == torch.float32 else gpu.peak_flops
    speed_up = efficiency.float8 if scenario.shape.quantization == "fp8" else 1.0
    moved = efficiency.bandwidth * gpu.memory_bandwidth
    return Rates(speed_up * efficiency.products * peak, efficiency.attention * peak, moved)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and how sure they are."""

    compute_seconds: float
    waiting_seconds: float  # where traffic goes on while a GPU computes
    traffic_seconds: float  # which it would wait if nothing did
    low: float  # a step may take this share of its seconds
    high: float  # or so many times its seconds
    is_traced: bool  # whether what moves is counted; else it follows from a formula

    @property
    def seconds(self) -> float:
        """The seconds that a step most likely takes."""
        return self.compute_seconds + self.waiting_seconds

    @property
    def range_seconds(self) -> tuple[float, float]:
        """The seconds that it takes at least and at most. At most nothing overlaps."""
        return self.low * self.seconds, self.high * (self.compute_seconds + self.traffic_seconds)

    def scale(self, share: float, low: float, high: float) -> "StepTime":
        """Return the time that is this share of it, with another range."""
        computing, waiting = share * self.compute_seconds, share * self.waiting_seconds
        return StepTime(computing, waiting, share * self.traffic_seconds, low, high, self.is_traced)


def time_step(
    host: InstanceType, scenario: MemoryScenario, plan: ParallelismPlan, gpus: int, row_tokens: float
) -> StepTime | None:
    """Return what a step takes on so many GPUs. None: the config does not tell how many experts a token goes to.

    A sharded model is spread over the scenario's `world_size`, and replicated over the others. `row_tokens` is the
    length of the row that a token stands in. Raise UnknownShapeError where not even the model's parts are known.
    """
    efficiency, training = find_efficiency(host.gpu.name), scenario.settings.training
    trace = find_trace(scenario, plan)
    passes = count_passes(scenario, plan, trace, row_tokens)
    if passes is None:
        return None
    rates = find_rates(host.gpu, efficiency, scenario)
    forward, backward = (each.time(rates) for each in passes)
    shards = scenario.target.world_size if plan.sharded else 1
    spread = Spread(gpus, shards, training.gradient_accumulation_steps)
    traffic = count_traffic(scenario.shape, scenario.dtypes[1], shards)
    waiting, everything = time_waits(host, traffic, spread, forward, backward) if gpus > 1 else (0.0, 0.0)
    update = UPDATE_BYTES * scenario.shape.num_trained / shards / rates.moved
    return StepTime(
        compute_seconds=spread.pieces * (forward + backward) + update,
        waiting_seconds=waiting,
        traffic_seconds=everything,
        low=efficiency.low,
        high=efficiency.high,
        is_traced=trace is not None,
    )


def find_trace(scenario: MemoryScenario, plan: ParallelismPlan) -> tuple[StepTrace, StepTrace] | None:
    """Return the step's trace, and the trace of layers that keep their activations. None: it cannot be traced."""
    step = scenario.build_step(plan)
    try:
        trace = trace_step(scenario.shape, step)
        kept = trace_step(scenario.shape, replace(step, recompute_activations=False)) if plan.kept_layers else trace
    except UnknownShapeError:
        return None
    return trace, kept


def count_passes(
    scenario: MemoryScenario, plan: ParallelismPlan, traces: tuple[StepTrace, StepTrace] | None, row_tokens: float
) -> tuple[Pass, Pass] | None:
    """Return the work of the forward and the backward pass over a batch. Layers that are recomputed add to the latter.

    That adds a forward pass: to three where all weights are trained, and to two where the base is frozen.
    """
    shape, config = scenario.shape, scenario.config
    forward, both = (count_products(shape, config, *factors) for factors in ((2, 2), (4, 6)))
    if forward is None or both is None:
        return None
    attention = count_attention(config.get_text_config(), row_tokens)
    recomputed = (shape.num_layers - plan.kept_layers) / shape.num_layers if plan.recompute_activations else 0.0
    tokens = scenario.settings.training.per_device_train_batch_size * scenario.length
    moved, moved_back, offloaded = count_moved(scenario, plan, traces, tokens, recomputed)
    return (
        Pass(tokens * forward, tokens * attention / 3, moved, offloaded),
        Pass(
            tokens * (both - forward + recomputed * forward),
            tokens * attention * (2 + recomputed) / 3,
            moved_back,
            offloaded,
        ),
    )


def count_moved(
    scenario: MemoryScenario,
    plan: ParallelismPlan,
    traces: tuple[StepTrace, StepTrace] | None,
    tokens: int,
    recomputed: float,
) -> tuple[float, float, float]:
    """Return the bytes that move in the forward pass, in the backward pass, and to the host's memory between them."""
    shape = scenario.shape
    if traces is None:
        numbers = tokens * scenario.config.get_text_config().hidden_size * shape.num_layers
        forward, backward = (numbers * each for each in FORMULA_BYTES)
        return forward, backward + recomputed * forward, 2 * numbers if plan.offload_activations else 0.0
    trace, kept = traces
    sources = [kept if index >= shape.num_layers - plan.kept_layers else trace for index in range(shape.num_layers)]
    pairs = list(zip(sources, shape.kinds, strict=True))
    forward = trace.embedding.moved + sum(source.forward[kind].moved for source, kind in pairs)
    backward = trace.head.moved + trace.end.moved + sum(source.backward[kind].moved for source, kind in pairs)
    return forward, backward, sum(trace.offloaded[kind] for kind in shape.kinds)
