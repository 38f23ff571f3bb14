# SPDX-License-Identifier: Apache-2.0
"""The seconds of a training step by a roofline: each pass takes what its operations and bytes take at a GPU's speed.

Products of matrices and attention are counted by `flops`. `step_trace` counts all that is read and written besides, and
the operations that the host starts one by one. A formula does so for a model whose code does not run without numbers.
`traffic` adds what GPUs exchange. A model that writes completions reads its prompts in one pass, and makes another one
for each token.
"""

import functools
from dataclasses import dataclass, replace

import torch

from llm_trainer.config.generation import count_batches
from llm_trainer.model.layers.kept_logits import MAX_LOGITS_BYTES
from llm_trainer.model.layers.reward_head import is_reward_model
from llm_trainer.model.memory.batch import Batch
from llm_trainer.model.memory.flops import PLAIN, count_attention, count_head_products, count_products
from llm_trainer.model.memory.gpus import Gpu
from llm_trainer.model.memory.scenario import MemoryScenario, ParallelismPlan
from llm_trainer.model.memory.shape import ModelShape, UnknownShapeError, count_cache_bytes
from llm_trainer.model.memory.step_trace import Span, StepTrace, trace_step
from llm_trainer.model.memory.tower_trace import trace_tower
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
# A pass for one token starts so many operations in a layer more than one in a training, for its keys and values, and so
# many besides, to choose the token. Counted in Transformers 5.23: a small Llama starts 39 in a layer, and 65 besides.
TOKEN_LAUNCHES = (4, 55)
CACHE_MOVES = 3  # keys and values are read and written, as they are copied to where one more has room, and read again
# Completions end by themselves, at a length that nobody knows before. A step takes at least this share of the time
# of the longest: an assumption. The last one of a batch to end decides, and a limit of twice what it needs is wide.
SHORTEST_SHARE = 0.5
Work = list[tuple[float, "Pass"]]  # passes, each with the number of times that a step takes it
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
    weights: float = 0.0  # bytes that products of few tokens read, which may take longer than their operations

    def time(self, rates: "Rates") -> float:
        """Return the seconds that it takes at these rates. A host starts operations while a GPU runs others."""
        products = self.products / rates.products + self.float8_products / rates.float8_products
        computing = (
            max(products, self.weights / rates.moved) + self.attention / rates.attention + self.moved / rates.moved
        )
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
    # What a batch takes beside its own two passes, in forward passes: of a reference, a teacher, or to write it.
    untrained_passes: float = 0.0
    evaluation_passes: float = 0.0  # the same in evaluations

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
        traffic = share * self.traffic_seconds
        return replace(
            self, compute_seconds=computing, waiting_seconds=waiting, traffic_seconds=traffic, low=low, high=high
        )


def time_step(
    host: InstanceType, scenario: MemoryScenario, plan: ParallelismPlan, gpus: int, row_tokens: float
) -> StepTime | None:
    """Return what a step takes on so many GPUs. None: the config does not tell how many experts a token goes to.

    None comes back, too, where a teacher's shape is not known, or what images take in the tower. A sharded model is
    spread over the scenario's `world_size`, and replicated over the others. `row_tokens` is the length of the row that
    a token stands in. Raise UnknownShapeError where not even the model's parts are known.
    """
    trace = find_trace(scenario, plan)
    passes = add_tower(count_passes(scenario, plan, trace, row_tokens), scenario, plan)
    taught = count_teaching(scenario, row_tokens)
    if passes is None or taught is None:
        return None
    efficiency = find_efficiency(host.gpu.name)
    rates = find_rates(host.gpu, efficiency, scenario)
    shards = scenario.target.world_size if plan.sharded else 1
    traffic = count_traffic(scenario.shape, scenario.dtypes[1], shards)
    passes = add_copies(passes, traffic) if shards > 1 else passes
    besides, in_evaluation = ([*taught, *list_besides(scenario, passes[0], evaluates)] for evaluates in (False, True))
    work = list_step(scenario, [*((1.0, each) for each in passes), *besides], shards)
    computing, low, high = (time_work(work, each) + each.between_seconds for each in list_rates(rates, efficiency))
    least = SHORTEST_SHARE if scenario.settings.data.generates else 1.0
    pieces = scenario.settings.training.gradient_accumulation_steps
    spread = Spread(gpus, shards, pieces, forwards=1 + scenario.untrained_passes)
    forward, backward = (each.time(rates) for each in passes)
    waiting, everything = time_waits(host, traffic, spread, forward, backward) if gpus > 1 else (0.0, 0.0)
    shares = least * low / computing, high / computing
    others = (time_work(each, rates) / forward for each in (besides, in_evaluation))
    return StepTime(computing, waiting, everything, *shares, trace is not None, *others)


def list_step(scenario: MemoryScenario, batch: Work, shards: int) -> Work:
    """Return the passes of a step whose batches take these, with the update of so many shards."""
    pieces = scenario.settings.training.gradient_accumulation_steps
    update = Pass(0.0, 0.0, 0.0, UPDATE_BYTES * scenario.shape.num_trained / shards, 0.0, 0, 0)
    return [*((pieces * times, each) for times, each in batch), (1.0, update)]


def list_rates(rates: Rates, efficiency: Efficiency) -> list[Rates]:
    """List the likely rates, those of a GPU and a host at their fastest, and at their slowest."""
    host = read_host(not rates.is_own_host)
    return [rates, rates.slow_down(efficiency.low, host.low), rates.slow_down(efficiency.high, host.high)]


def time_work(work: Work, rates: Rates) -> float:
    """Return the seconds of passes, each as often as it comes."""
    return sum(times * each.time(rates) for times, each in work)


def count_teaching(scenario: MemoryScenario, row_tokens: float) -> Work | None:
    """Return the pass of a teacher, if there is one, over the student's batch. None: its shape is not known."""
    if scenario.teacher is None:
        return []
    try:
        shape = scenario.teacher_shape
    except UnknownShapeError:
        return None
    own = replace(scenario, config=scenario.teacher.config, known_shape=shape, known_batch=scenario.batch, teacher=None)
    own = replace(own, fused_kernels=frozenset())
    passes = count_passes(own, PLAIN, find_trace(own, PLAIN, trains=False), row_tokens)
    return passes and [(1.0, passes[0])]


def list_besides(scenario: MemoryScenario, forward: Pass, evaluates: bool) -> Work:
    """Return what the model itself computes for a batch beside its own two passes.

    Each pass without gradients, such as a reference makes, is another forward pass. It keeps no activations.
    """
    asked = scenario.untrained_passes, replace(forward, offloaded=0.0)
    return [asked, *list_writing(scenario, forward, evaluates)]


def list_writing(scenario: MemoryScenario, forward: Pass, evaluates: bool) -> Work:
    """Return the passes that write a batch's completions, as parts of those that write many at once.

    `forward` is the model's pass over the batch. All completions are as long as `max_completion_length` allows, and the
    pass over the prompts gives the first token. What rewards take is not known.
    """
    settings, written = scenario.settings, scenario.settings.completion_tokens
    if scenario.generated is None:
        return []
    at_once = scenario.generated.num_sequences
    share = 1 / count_batches(settings.generation, scenario.target.world_size)
    if evaluates:
        at_once = settings.training.per_device_eval_batch_size
        share = scenario.batch.num_sequences / at_once
    prompt = scenario.batch.length - written
    reading = count_reading(scenario, forward, Batch(at_once, prompt, at_once))
    token = count_reading(scenario, forward, Batch(at_once, 1, at_once))
    before = at_once * (prompt + written // 2)  # tokens whose keys and values a pass reads, on average
    cache = CACHE_MOVES * count_cache_bytes(scenario.config, before, scenario.dtypes[1])
    launches = token.launches + TOKEN_LAUNCHES[0] * scenario.shape.num_layers + TOKEN_LAUNCHES[1]
    token = replace(token, moved=token.moved + cache, launches=launches)
    return [(share, reading), (share * (written - 1), token)]


def count_reading(scenario: MemoryScenario, forward: Pass, batch: Batch) -> Pass:
    """Return a pass over other tokens than `forward` goes over. It moves as many bytes for each of them."""
    other = replace(scenario, known_batch=batch, known_shape=scenario.shape)
    passes = count_passes(other, PLAIN, None, batch.length)
    assert passes is not None
    moved = forward.moved * batch.num_tokens / scenario.batch.num_tokens
    weights = count_read_bytes(scenario.shape, scenario.dtypes[1])
    counts = forward.launches, forward.functions
    return replace(passes[0], moved=moved, launches=counts[0], functions=counts[1], weights=weights)


@functools.lru_cache(maxsize=64)
def count_read_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Return the bytes of all weights that a pass reads, with copies of those that are of another type.

    Embeddings are looked up, unless they are the output's weights, too. Of experts, some token of many reads each.
    """
    looked_up = ("embeddings",) if shape.count_weights("output") else ()
    parts = [part for part in shape.parts if part.role not in looked_up]
    copied = sum(part.num_weights for part in parts if part.data_bytes != part.num_weights * dtype.itemsize)
    return sum(part.data_bytes + part.scales_bytes for part in parts) + 2 * dtype.itemsize * copied


def add_copies(passes: tuple[Pass, Pass], traffic: Traffic) -> tuple[Pass, Pass]:
    """Return the passes with what FSDP2 reads and writes to lay gathered weights, and gradients to reduce, in place."""
    forward, backward = passes
    again = 2 * (traffic.gathered_again + traffic.reduced)
    return (
        replace(forward, moved=forward.moved + 2 * traffic.gathered),
        replace(backward, moved=backward.moved + again),
    )


def find_trace(
    scenario: MemoryScenario, plan: ParallelismPlan, trains: bool = True
) -> tuple[StepTrace, StepTrace] | None:
    """Return the step's trace, and the trace of layers that keep their activations. None: it cannot be traced."""
    step = replace(scenario.build_step(plan), trains=trains)
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


def add_tower(
    passes: tuple[Pass, Pass] | None, scenario: MemoryScenario, plan: ParallelismPlan
) -> tuple[Pass, Pass] | None:
    """Return the passes with the work of the tower on the images of a mean row. None: that is not known."""
    step = scenario.build_step(plan)
    try:
        tower = trace_tower(scenario.shape, step, accumulates=False)
    except UnknownShapeError:
        return None
    if passes is None or tower is None or step.images is None:
        return passes
    share = step.images.mean_share
    works = (tower.flops, tower.forward), (tower.backward_flops, tower.backward)
    first, second = (
        replace(
            each,
            products=each.products + share * products,
            moved=each.moved + share * span.moved,
            launches=each.launches + round(share * span.launches),
        )
        for each, (products, span) in zip(passes, works, strict=True)
    )
    return first, second


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
