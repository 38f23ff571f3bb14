# SPDX-License-Identifier: Apache-2.0
"""A job as far as its memory depends on it, and the ways in which its step can be spread over devices."""

import functools
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

import torch
from transformers import PreTrainedConfig

from llm_trainer.config.generation import GenerationSettings, count_generated, count_iterations, count_scorings
from llm_trainer.config.rules.table import supports_fsdp
from llm_trainer.config.sections import (
    REFERENCE_METHODS,
    WITHOUT_DIVERGENCE,
    AdapterSettings,
    DataSettings,
    MethodSettings,
    ModelSettings,
    ParallelismSettings,
    Section,
    TrainingSettings,
)
from llm_trainer.data.images.row_images import RowImages
from llm_trainer.model.device import Device
from llm_trainer.model.lora_init import begins_at_zero
from llm_trainer.model.memory.batch import Batch
from llm_trainer.model.memory.estimate import Estimate, Setup, estimate_memory
from llm_trainer.model.memory.shape import ModelShape, count_cache_bytes, read_shape
from llm_trainer.model.memory.step_trace import Step
from llm_trainer.model.precision import choose_precision
from llm_trainer.model.teacher.teacher import Teacher

# A change of these changes the model's shape.
SHAPE_SETTINGS = frozenset({"use_peft", "load_in_4bit", "base_compute", "torch_dtype"})


@dataclass(frozen=True)
class MemorySettings:
    """The sections of the settings that the memory of a step depends on."""

    model: ModelSettings
    adapter: AdapterSettings
    data: DataSettings
    training: TrainingSettings
    parallelism: ParallelismSettings
    methods: MethodSettings = field(default_factory=MethodSettings)

    @property
    def generation(self) -> GenerationSettings:
        """The sections that decide how many completions are written."""
        return GenerationSettings(self.data, self.methods, self.training)

    @property
    def completion_tokens(self) -> int:
        """The tokens that the model writes behind a row at most."""
        return self.methods.count_written(self.data.method)

    def replace(self, **values: Any) -> "MemorySettings":
        """Return a copy with other values of some settings, by their flat names. They count as given."""
        changed: dict[str, Any] = {}
        for each in fields(self):
            section: Section = getattr(self, each.name)
            own = {name: value for name, value in values.items() if name in type(section).model_fields}
            if own:
                changed[each.name] = section.replace(**own)
        return replace(self, **changed)

    @property
    def can_shard(self) -> bool:
        """True where FSDP can shard a base that is loaded so, with an adapter that begins so."""
        return supports_fsdp(self.model, self.adapter, self.training.optim)

    @property
    def can_offload(self) -> bool:
        """True where the method's trainer can keep activations in the host's memory."""
        return self.data.method != "distill" and not self.data.generates

    @property
    def has_reference(self) -> bool:
        """True where the loss compares the model with what it was before the first step."""
        return self.data.method in REFERENCE_METHODS

    @property
    def asks_reference_first(self) -> bool:
        """True where the reference is asked about all rows before the first step."""
        return self.has_reference and (not self.adapter.use_peft or bool(self.methods.precompute_ref_log_probs))

    @property
    def copies_adapter(self) -> bool:
        """True where the reference has a copy of the adapter, as switching it off would not bring the start back."""
        moves = self.adapter.goes_on or not begins_at_zero(self.adapter.init_lora_weights)
        return self.has_reference and self.adapter.use_peft and moves


@dataclass(frozen=True)
class Target:
    """The devices that a job runs on."""

    device: Device
    world_size: int
    free_bytes: int  # on the device with the least free memory

    @property
    def on_gpu(self) -> bool:
        """True where the devices are GPUs."""
        return self.device.is_gpu

    @property
    def unit(self) -> str:
        """The word for one device in a message."""
        return "GPU" if self.on_gpu else "process"


@dataclass(frozen=True)
class ParallelismPlan:
    """Way in which a model is spread over devices, and less of a step is held in their memory."""

    sharded: bool
    recompute_activations: bool
    offload_activations: bool
    kept_layers: int = 0  # the last so many layers keep their activations where others are recomputed
    num_layers: int = 0  # in all, where some are kept

    def describe(self, world_size: int) -> str:
        """Return words for a message, such as `FSDP with gradient checkpointing`."""
        spread = "FSDP" if self.sharded else "DDP" if world_size > 1 else "training"
        share = f" of {self.num_layers - self.kept_layers} of {self.num_layers} layers" if self.kept_layers else ""
        savings = [f"gradient checkpointing{share}"] * self.recompute_activations
        savings += ["activation offloading"] * self.offload_activations
        return f"{spread} with {' and '.join(savings)}" if savings else spread


def list_parallelism_plans(settings: MemorySettings, target: Target) -> list[ParallelismPlan]:
    """Return the ways that the settings leave open, the cheapest first.

    - Checkpointing computes a layer's forward pass twice and sends nothing. That is a third more work where all weights
      are trained, and half more with adapters, as frozen weights get no gradients.
    - FSDP gathers all weights twice a step. With adapters, for which DDP sends next to nothing, it costs more, and much
      more between hosts. It therefore comes second.
    - Offloading sends activations over PCIe and back. It comes last, on top of checkpointing, which leaves little to
      send.
    """
    open_choice = (False, True)
    parallelism = settings.parallelism
    spreads = open_choice if target.world_size > 1 and settings.can_shard else (False,)
    distribution = {"ddp": (False,), "fsdp": (True,), "auto": spreads}
    checkpointing, offloading = parallelism.gradient_checkpointing, parallelism.activation_offloading
    ways = product(
        open_choice if offloading is None and target.on_gpu and settings.can_offload else (bool(offloading),),
        distribution[parallelism.distribution],
        open_choice if checkpointing is None else (checkpointing,),
    )
    return [
        ParallelismPlan(sharded, recompute_activations=recomputes, offload_activations=offloads)
        for offloads, sharded, recomputes in ways
        if recomputes or not offloads or offloading or checkpointing is False
    ]


@dataclass(frozen=True, eq=False)
class MemoryScenario:
    """A job as far as its memory depends on it. Changed copies of it are tried out, too."""

    config: PreTrainedConfig
    settings: MemorySettings
    longest_row: int  # in tokens, before rows are cut to `max_length`
    target: Target
    attention: str = "sdpa"  # the kernel, by Transformers' name; `fit.choose_kernels` puts the model's own here
    fused_kernels: frozenset[str] = frozenset()  # Liger's, by the names of its options
    evaluates: bool = False  # whether there are rows to evaluate between steps
    known_shape: ModelShape | None = None  # handed on to copies of the same model, as it takes long to read
    known_batch: Batch | None = None  # None: the largest that may come
    teacher: Teacher | None = None  # of a distillation
    images: RowImages | None = None  # of the row with the most; None without

    @functools.cached_property
    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The type of the weights in memory, and the type of the computation."""
        precision = choose_precision(self.settings.model, self.settings.adapter, self.target.device)
        training = self.settings.training
        if not training.is_given("bf16", "fp16"):
            return precision.weights, precision.compute
        if training.bf16:
            return precision.weights, torch.bfloat16
        return precision.weights, torch.float16 if training.fp16 else precision.weights

    @property
    def traced_dtype(self) -> torch.dtype:
        """The type that stands for the computation's in a trace: the shape's own, where weights need no cast.

        The shape may be that for a type of the same size, so that GPUs with and without bfloat16 share traces.
        """
        weights, compute = self.dtypes
        return self.shape.weights_dtype if weights == compute else compute

    @functools.cached_property
    def shape(self) -> ModelShape:
        """The shape of the model with its adapter. Raises UnknownShapeError."""
        return self.known_shape or read_shape(
            self.config, self.settings.model, self.settings.adapter, weights_dtype=self.dtypes[0]
        )

    @property
    def teacher_shape(self) -> ModelShape | None:
        """The shape of the teacher, None where there is none. Raises UnknownShapeError."""
        return read_teacher_shape(self.teacher, self.dtypes[1]) if self.teacher else None

    @property
    def length(self) -> int:
        """The length of a sequence in tokens."""
        data = self.settings.data
        if data.packing and data.max_length:
            return data.max_length
        length = min(data.max_length or self.longest_row, self.longest_row) + self.settings.completion_tokens
        multiple = data.pad_to_multiple_of
        return length + -length % (int(multiple) if str(multiple).isdigit() else 1)

    @property
    def batch(self) -> Batch:
        """The batch whose step is planned: one that is known, else the largest that may come."""
        data, training = self.settings.data, self.settings.training
        num_sequences = training.per_device_train_batch_size * data.sequences_a_row
        is_shared = num_sequences > 1 or bool(data.packing)
        num_scored = num_sequences * self.settings.completion_tokens or None
        return self.known_batch or Batch(num_sequences, self.length, num_scored, is_shared, self.images)

    @property
    def generated(self) -> Batch | None:
        """The completions that a device writes at once, with their prompts; None where it writes none."""
        settings = self.settings
        if not settings.data.generates:
            return None
        num_devices = self.target.world_size
        return Batch(-(-count_generated(settings.generation, num_devices) // num_devices), self.length)

    @property
    def untrained_passes(self) -> float:
        """The forward passes that each batch takes without gradients, beside the one that is trained on.

        The reference's is one. Where KTO estimates a divergence, model and reference are asked about other answers.
        Completions are scored once, however often they are trained on.
        """
        settings = self.settings
        if settings.data.generates:
            scorings = count_scorings(settings.generation, self.target.world_size)
            return scorings / count_iterations(settings.generation)
        estimates = settings.data.is_judged and settings.methods.loss_type != WITHOUT_DIVERGENCE
        asks_reference = settings.has_reference and not settings.asks_reference_first
        return estimates + asks_reference * (1 + estimates)

    @property
    def has_mask(self) -> bool:
        """True where the kernel reads an attention mask. Flash and flex attention read lengths instead."""
        reads_lengths = self.attention.startswith(("flash", "flex"))
        return self.batch.shares_sequences and not reads_lengths

    def build_step(self, plan: ParallelismPlan) -> Step:
        """Return a step in this way. Where weights are sharded, a batch of texts alone gets a white image."""
        batch = self.batch
        longest_text = batch.images.longest_text if batch.images and plan.sharded else 0
        return Step(
            num_sequences=batch.num_sequences,
            length=max(2, batch.length, longest_text),
            has_mask=self.has_mask,
            stores_scores=self.attention == "eager",
            compute_dtype=self.traced_dtype,
            recompute_activations=plan.recompute_activations,
            offload_activations=plan.offload_activations,
            sharded=plan.sharded,
            on_gpu=self.target.on_gpu,
            fused_kernels=self.fused_kernels,
            num_scored=batch.num_scored,
            teacher_width=self.teacher.config.get_text_config().hidden_size if self.teacher else None,
            images=batch.images,
        )

    def estimate(self, plan: ParallelismPlan) -> Estimate:
        """Return what each device needs for a step in this way. Raise UnknownShapeError."""
        training, step = self.settings.training, self.build_step(plan)
        accumulates = training.gradient_accumulation_steps > 1
        evaluated = Batch(self.count_evaluated() * self.settings.data.sequences_a_row, step.length)
        setup = Setup(
            step,
            self.target.world_size,
            training.optim,
            accumulates,
            plan.kept_layers,
            evaluated if self.evaluates or self.settings.asks_reference_first else None,
            self.settings.copies_adapter,
            teacher=self.teacher_shape,
            cache_bytes=self.count_cache_bytes(),
            pixel_bytes=self.count_pixel_bytes(),
        )
        return estimate_memory(self.shape, setup)

    def count_evaluated(self) -> int:
        """Return the rows of the largest batch that goes through the model without gradients, except those of steps."""
        settings = self.settings
        asked = settings.methods.precompute_ref_batch_size if settings.asks_reference_first else None
        evaluated = settings.training.per_device_eval_batch_size
        return max(asked or evaluated, evaluated if self.evaluates else 0)

    def count_cache_bytes(self) -> int:
        """Return the bytes of keys and values of all that a device writes at once, for its evaluations, too."""
        batch = self.generated
        if batch is None:
            return 0
        num_evaluated = self.settings.training.per_device_eval_batch_size if self.evaluates else 0
        num_tokens = max(batch.num_sequences, num_evaluated) * batch.length
        return count_cache_bytes(self.config, num_tokens, self.dtypes[1])

    def count_pixel_bytes(self) -> int:
        """Return the bytes of the images that lie on a device: those of a step's batches, or of an evaluation's.

        The next batch is fetched before a step, which on a CPU is the same memory.
        """
        batch, training = self.batch, self.settings.training
        if batch.images is None:
            return 0
        num_trained = batch.num_sequences * (training.gradient_accumulation_steps + (not self.target.on_gpu))
        num_evaluated = self.count_evaluated() * (1 + (not self.target.on_gpu)) if self.evaluates else 0
        return batch.images.count_bytes(max(num_trained, num_evaluated))

    def can_hold(self, need: Estimate, share: float = 1.0) -> bool:
        """Tell whether what is needed is at most this share of what is free on each device."""
        return need.total_bytes <= share * self.target.free_bytes

    def replace_settings(self, **values: Any) -> "MemoryScenario":
        """Return the same job with other values of some settings, by their flat names."""
        shape = None if values.keys() & SHAPE_SETTINGS else self.shape
        return replace(self, settings=self.settings.replace(**values), known_shape=shape)

    def replace_target(self, **values: Any) -> "MemoryScenario":
        """Return the same job on other devices, with other values of Target's fields."""
        return replace(self, target=replace(self.target, **values), known_shape=self.shape)


@functools.lru_cache(maxsize=8)
def read_teacher_shape(teacher: Teacher, dtype: torch.dtype) -> ModelShape:
    """Return the shape of a teacher that computes in this type. Raise UnknownShapeError."""
    return read_shape(teacher.config, teacher.settings, AdapterSettings(use_peft=False), dtype)
