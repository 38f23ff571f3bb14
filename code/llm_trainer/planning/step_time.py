# SPDX-License-Identifier: Apache-2.0
"""The seconds of a training step by a roofline: each pass takes what its operations and bytes take at a GPU's speed.

Products of matrices and attention are counted by `flops`. `step_trace` counts all that is read and written besides, and
the operations that the host starts one by one. A formula does so for a model whose code does not run without numbers.
`traffic` adds what GPUs exchange.
"""

from dataclasses import dataclass, replace

import torch

from llm_trainer.model.layers.kept_logits import MAX_LOGITS_BYTES
from llm_trainer.model.layers.reward_head import is_reward_model
from llm_trainer.model.memory.flops import count_attention, count_head_products, count_products
from llm_trainer.model.memory.gpus import Gpu
from llm_trainer.model.memory.scenario import MemoryScenario, ParallelismPlan
from llm_trainer.model.memory.shape import UnknownShapeError
from llm_trainer.model.memory.step_trace import Span, StepTrace, trace_step
from llm_trainer.planning.efficiency import Efficiency, find_efficiency, read_host
from llm_trainer.planning.instances import InstanceType
from llm_trainer.planning.traffic import Spread, Traffic, count_traffic, time_waits

# For each trained weight: AdamW reads weight, gradient and two states of 4 bytes, and writes all but the gradient. The
# norm reads the gradient, and clipping reads and writes it.
UPDATE_BYTES = 40
# Where no trace is: bytes for each number of a token's hidden state in a layer, and a layer's launches and functions,
# forward and backward. A Llama of 8B with an adapter has so many (bench/RESULTS.md, GPU).
FORMULA_BYTES, FORMULA_LAUNCHES = (107, 202), ((51, 12), (73, 12))
PCIE_BYTES = 25e9  # a second, of activations that wait in the host's memory: what PCIe 4.0 x16 reaches of 32
# A row takes the time of so many tokens more in attention: tiles that a causal mask cuts, and the start of each. 8B in
# rows of 1,024 shows it (bench/RESULTS.md, GPU). flash-attn's own figures say 530 (arXiv:2407.08608, figures 5 and 6).
ROW_START = 650
Others = tuple[float, float, int, int]  # the last fields of a Pass, from `moved` on


@dataclass(frozen=True)
class Pass:
    """Work of a GPU in a pass over a batch."""

    products: float  # operations
    float8_products: float  # operations in float8
    attention: float  # operations
    moved: float  # bytes of its own memory, besides those of products
    offloaded: float  # bytes to or from the host's memory
    launches: int  # operations that the host starts
    functions: int  # autograd functions in Python that it goes through

    def time(self, rates: "Rates") -> float:
        """Return the seconds that it takes at these rates. A host starts operations while a GPU runs others."""
        products = self.products / rates.products + self.float8_products / rates.float8_products
        computing = products + self.attention / rates.attention + self.moved / rates.moved
        starting = self.launches * rates.launch_seconds + self.functions * rates.function_seconds
        if rates.is_own_host:
            return computing + starting
        return max(computing, self.offloaded / PCIE_BYTES, starting)


@dataclass(frozen=True)
class Rates:
    """The work of a GPU in a second, and the seconds that its host takes for what it does."""

    products: float  # operations
    float8_products: float
    attention: float
    moved: float  # bytes of its own memory
    launch_seconds: float  # of an operation
    function_seconds: float  # of an autograd function in Python, besides its operations
    between_seconds: float  # from a step's last operation to the first of the next
    is_own_host: bool  # as a CPU is

    def slow_down(self, gpu: float, host: float) -> "Rates":
        """Return the rates of a GPU and a host that take so many times as long."""
        return Rates(
            self.products / gpu,
            self.float8_products / gpu,
            self.attention / gpu,
            self.moved / gpu,
            self.launch_seconds * host,
            self.function_seconds * host,
            self.between_seconds * host,
            self.is_own_host,
        )


def find_rates(gpu: Gpu, efficiency: Efficiency, scenario: MemoryScenario) -> Rates:
    """Return what a GPU or a CPU does in a second in the type that the job computes in."""
    peak = gpu.fp32_flops if scenario.dtypes[1] == torch.float32 else gpu.peak_flops
    host = read_host(scenario.target.on_gpu)
    return Rates(
        products=efficiency.products * peak,
        float8_products=efficiency.products * (gpu.fp8_flops or peak),
        attention=efficiency.attention * peak,
        moved=efficiency.bandwidth * gpu.memory_bandwidth,
        launch_seconds=host.launch_seconds,
        function_seconds=host.function_seconds,
        between_seconds=host.between_seconds,
        is_own_host=not scenario.target.on_gpu,
    )


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

    Each pass without gradients, such as a reference makes, is another forward pass of the same model.
    A sharded model is spread over the scenario's `world_size`, and replicated over the others. `row_tokens` is the
    length of the row that a token stands in. Raise UnknownShapeError where not even the model's parts are known.
    """
    trace = find_trace(scenario, plan)
    passes = count_passes(scenario, plan, trace, row_tokens)
    if passes is None:
        return None
    efficiency = find_efficiency(host.gpu.name)
    rates = find_rates(host.gpu, efficiency, scenario)
    shards = scenario.target.world_size if plan.sharded else 1
    forwards = 1 + scenario.settings.untrained_passes
    spread = Spread(gpus, shards, scenario.settings.training.gradient_accumulation_steps, forwards)
    traffic = count_traffic(scenario.shape, scenario.dtypes[1], shards)
    passes = add_copies(passes, traffic) if shards > 1 else passes
    update = UPDATE_BYTES * scenario.shape.num_trained / shards
    computing, low, high = (time_computing(passes, spread, update, each) for each in list_rates(rates, efficiency))
    forward, backward = (each.time(rates) for each in passes)
    waiting, everything = time_waits(host, traffic, spread, forward, backward) if gpus > 1 else (0.0, 0.0)
    return StepTime(computing, waiting, everything, low / computing, high / computing, is_traced=trace is not None)


def list_rates(rates: Rates, efficiency: Efficiency) -> list[Rates]:
    """List the likely rates, those of a GPU and a host at their fastest, and at their slowest."""
    host = read_host(not rates.is_own_host)
    return [rates, rates.slow_down(efficiency.low, host.low), rates.slow_down(efficiency.high, host.high)]


def time_computing(passes: tuple[Pass, Pass], spread: Spread, update: float, rates: Rates) -> float:
    """Return the seconds of a step's batches, of an update that moves so many bytes, and of the pause between steps.

    A forward pass without gradients keeps no activations.
    """
    forward, backward = passes
    asking = (spread.forwards - 1) * replace(forward, offloaded=0.0).time(rates)
    batch = asking + forward.time(rates) + backward.time(rates)
    return spread.pieces * batch + update / rates.moved + rates.between_seconds


def add_copies(passes: tuple[Pass, Pass], traffic: Traffic) -> tuple[Pass, Pass]:
    """Return the passes with what FSDP2 reads and writes to lay gathered weights, and gradients to reduce, in place."""
    forward, backward = passes
    again = 2 * (traffic.gathered_again + traffic.reduced)
    return (
        replace(forward, moved=forward.moved + 2 * traffic.gathered),
        replace(backward, moved=backward.moved + again),
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
    shape, batch, config = scenario.shape, scenario.batch, scenario.config
    forward, both = (count_products(shape, config, *factors) for factors in ((2, 2), (4, 6)))
    if forward is None or both is None:
        return None
    in_float8 = 2 * shape.count_weights("linear") if shape.quantization == "fp8" else 0
    recomputed = (shape.num_layers - plan.kept_layers) / shape.num_layers if plan.recompute_activations else 0.0
    tokens, unscored = batch.num_tokens, batch.num_tokens - batch.find_num_scored()
    head, head_both = (count_head_products(shape, *factors) for factors in ((2, 2), (4, 6)))
    again = head * batch.find_num_scored() if computes_logits_again(scenario) else 0.0
    attention = tokens * count_causal_attention(scenario, row_tokens)
    moved = count_moved(scenario, plan, traces, tokens, recomputed)
    return (
        Pass(tokens * (forward - in_float8) - unscored * head, tokens * in_float8, attention / 3, *moved[0]),
        Pass(
            tokens * (both - forward - in_float8 + recomputed * (forward - in_float8))
            - unscored * (head_both - head)
            + again,
            tokens * (1 + recomputed) * in_float8,
            attention * (2 + recomputed) / 3,
            *moved[1],
        ),
    )


def computes_logits_again(scenario: MemoryScenario) -> bool:
    """Tell whether a CPU computes logits once more for their gradients, as it keeps only few.

    A GPU always does so, within the share of its peak that products are known to reach. A reward model has none.
    """
    if is_reward_model(scenario.config):
        return False
    width = scenario.config.get_text_config().vocab_size
    num_bytes = scenario.dtypes[1].itemsize * scenario.batch.find_num_scored() * width
    return not scenario.target.on_gpu and num_bytes > MAX_LOGITS_BYTES


def count_causal_attention(scenario: MemoryScenario, row_tokens: float) -> float:
    """Return the operations of attention for a token, with those that the start of a row takes the time of.

    A causal mask hides half of a row. A kernel that reads a mask computes what it hides, of the whole sequence.
    """
    config = scenario.config.get_text_config()
    hidden = 1.0 if scenario.has_mask else 0.5
    seen = count_attention(config, scenario.batch.length if scenario.has_mask else row_tokens)
    start = count_attention(config, ROW_START) if scenario.target.on_gpu else 0.0
    return hidden * seen + start / 2


def count_moved(
    scenario: MemoryScenario,
    plan: ParallelismPlan,
    traces: tuple[StepTrace, StepTrace] | None,
    tokens: int,
    recomputed: float,
) -> tuple[Others, Others]:
    """Return all work but operations in the forward and the backward pass."""
    shape = scenario.shape
    if traces is None:
        numbers = tokens * scenario.config.get_text_config().hidden_size * shape.num_layers
        offloaded = 2 * numbers if plan.offload_activations else 0.0
        forward, backward = (numbers * each for each in FORMULA_BYTES)
        first, second = (tuple(shape.num_layers * number for number in each) for each in FORMULA_LAUNCHES)
        again = [round(there + recomputed * number) for there, number in zip(second, first, strict=True)]
        return (forward, offloaded, *first), (backward + recomputed * forward, offloaded, *again)
    trace, kept = traces
    sources = [kept if index >= shape.num_layers - plan.kept_layers else trace for index in range(shape.num_layers)]
    pairs = list(zip(sources, shape.kinds, strict=True))
    there = [trace.embedding, *(source.forward[kind] for source, kind in pairs)]
    back = [trace.head, trace.end, *(source.backward[kind] for source, kind in pairs)]
    offloaded = sum(trace.offloaded[kind] for kind in shape.kinds)
    return sum_spans(there, offloaded), sum_spans(back, offloaded)


def sum_spans(spans: list[Span], offloaded: float) -> Others:
    """Return the work in these spans, which send so many bytes to the host's memory or back."""
    counts = ((span.moved, span.launches, span.functions) for span in spans)
    moved, launches, functions = (sum(each) for each in zip(*counts, strict=True))
    return moved, offloaded, launches, functions
