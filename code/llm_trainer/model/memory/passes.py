# SPDX-License-Identifier: Apache-2.0
"""The passes of a step in their order: what a device holds in each, and of gradients and gathered weights between them.

FSDP2 gathers and reduces a unit at a time (torch/distributed/fsdp/_fully_shard). Accelerate's fsdp2_prepare_model makes
a unit of each decoder layer, of the embeddings, and of the tail: last norm and output layer. Tied embeddings are in the
tail. The blocks of a tower for images are units of their own, which texts do not gather.
"""

from dataclasses import dataclass

import torch

from llm_trainer.model.memory.shape import ModelShape, Part
from llm_trainer.model.memory.step_trace import Span, Step, StepTrace
from llm_trainer.model.memory.tower_trace import TowerTrace


@dataclass(frozen=True)
class Unit:
    """Bytes of weights that FSDP2 gathers at once, and of their gradients. Without FSDP nothing is gathered."""

    gathered: int = 0  # in the type of the computation
    made: int = 0  # gradients as the backward pass makes them
    kept: int = 0  # of these, what a device keeps: a shard
    reduced: int = 0  # their float32 copy, which is summed over devices


@dataclass(frozen=True)
class Pass:
    """A stretch of a step. At its end the gradients of a unit are reduced."""

    span: Span
    unit: Unit = Unit()  # whose gradients it completes
    gathered: int = 0  # bytes of gathered weights in it
    still_gathered: int = 0  # and when it reduces


@dataclass(frozen=True)
class Peak:
    """Bytes at one moment of a step, beside weights and the optimizer."""

    gradients: int = 0
    activations: int = 0
    working: int = 0
    gathered: int = 0
    reduced: int = 0

    @property
    def total(self) -> int:
        """The bytes in all."""
        # By name, as `plan` asks a million times and dataclasses.astuple takes most of it.
        return self.gradients + self.activations + self.working + self.gathered + self.reduced


def list_passes(
    shape: ModelShape, step: Step, world_size: int, traces: tuple[StepTrace, StepTrace], num_kept: int
) -> list[Pass]:
    """Return the passes of a step of all layers. A trace's layers stand for all layers of their kind.

    The last layers are as in the second trace, which recomputes nothing. Their activations are gone when the first
    layers are computed again. On several ranks another unit is on its way beside each layer. Forward it is the copy
    that the layer came in, and backward it is the next layer. FSDP2 reduces tied embeddings at the end.
    """
    tail, embeddings = split_others(shape)
    first, last = weigh_unit(embeddings or tail, step, world_size), weigh_unit(tail, step, world_size)
    always = 0 if embeddings else last.gathered
    units = weigh_layers(shape, step, world_size)
    copies = 1 if world_size > 1 else 0
    sources = [traces[index >= shape.num_layers - num_kept] for index in range(shape.num_layers)]
    forward, backward = [], []
    for source, kind, unit in zip(sources, shape.kinds, units, strict=True):
        on_its_way = always + copies * unit.gathered
        forward.append(Pass(source.forward[kind], gathered=on_its_way + unit.gathered))
        backward.append(Pass(source.backward[kind], unit, on_its_way + unit.gathered, on_its_way))
    on_its_way = copies * units[-1].gathered
    at_head, at_end = (Unit(), last) if step.sharded and not embeddings else (last, first if embeddings else Unit())
    head = Pass(traces[0].head, at_head, last.gathered + on_its_way, on_its_way)
    return [
        Pass(traces[0].embedding, gathered=first.gathered),
        *forward,
        head,
        *backward[::-1],
        Pass(traces[0].end, at_end, first.gathered),
    ]


def add_tower(passes: list[Pass], tower: TowerTrace, unit: Unit) -> list[Pass]:
    """Return the passes of a step with those of its images: after the embedding, and last where the tower learns."""
    gathered = passes[0].gathered + unit.gathered
    return [passes[0], Pass(tower.forward, gathered=gathered), *passes[1:], Pass(tower.backward, unit, gathered)]


def weigh_tower(shape: ModelShape, step: Step, world_size: int) -> Unit:
    """Return the bytes of a tower's units: those outside of blocks, and two blocks, as the next one is on its way.

    Without FSDP the gradients of a tower are counted in its trace.
    """
    if not step.sharded:
        return Unit()
    whole = weigh_unit([part for part in shape.parts if part.role == "tower"], step, world_size)
    blocks = shape.list_tower_blocks()
    share = 1 - (sum(blocks) - 2 * max(blocks)) / max(1, shape.count_weights("tower")) if len(blocks) > 2 else 1.0
    return Unit(round(share * whole.gathered), whole.made, whole.kept, round(share * whole.reduced))


def split_others(shape: ModelShape) -> tuple[list[Part], list[Part]]:
    """Return the parts of the tail, and the embeddings where the output layer is not tied to them."""
    others = [part for part in shape.parts if part.layer is None and part.role != "tower"]
    if not any(part.role == "output" for part in others):
        return others, []
    is_embeddings = [part.role == "embeddings" for part in others]
    return (
        [part for part, embeds in zip(others, is_embeddings, strict=True) if not embeds],
        [part for part, embeds in zip(others, is_embeddings, strict=True) if embeds],
    )


def weigh_layers(shape: ModelShape, step: Step, world_size: int) -> list[Unit]:
    """Return the unit of each layer. Layers of a kind are weighed once."""
    layer_of_kind = dict(zip(shape.kinds, shape.list_layers(), strict=True))
    units = {kind: weigh_unit(layer, step, world_size) for kind, layer in layer_of_kind.items()}
    return [units[kind] for kind in shape.kinds]


def weigh_unit(parts: list[Part], step: Step, world_size: int) -> Unit:
    """Return the bytes of a unit with these parts."""
    trained_bytes = sum(part.trained_bytes for part in parts)
    if not step.sharded:
        return Unit(made=trained_bytes, kept=trained_bytes)
    trained = [part for part in parts if part.trained_bytes]
    return Unit(
        count_gathered_bytes(parts, step.compute_dtype, world_size),
        sum(part.num_weights for part in trained) * step.compute_dtype.itemsize,
        trained_bytes // world_size,
        sum(part.count_padded_weights(world_size) for part in trained) * torch.float32.itemsize,
    )


def count_gathered_bytes(parts: list[Part], compute_dtype: torch.dtype, shards: int) -> int:
    """Return the bytes of parts that FSDP2 gathers: in the type of the computation, unless they are quantized."""
    return sum(
        part.data_bytes if part.scales_bytes else part.count_padded_weights(shards) * compute_dtype.itemsize
        for part in parts
    )


def find_peak(passes: list[Pass], accumulated: int) -> Peak:
    """Return the moment of a step at which most is held.

    A pass leaves its unit's gradients behind. `accumulated` are the bytes of gradients that are there from the
    beginning, where those of several batches are added up: nothing is added to them. The float32 copy of a unit's
    gradients stays until the next unit's is made.
    """
    gradients, held, reduced = accumulated, 0, 0
    moments = [Peak(gradients)]
    for each in passes:
        unit = each.unit
        moments.append(Peak(gradients, held, each.span.peak, each.gathered, reduced))
        held += each.span.net
        if unit.reduced:
            reduced = unit.reduced
            moments.append(Peak(gradients, held, 0, each.still_gathered, reduced))
            moments.append(Peak(gradients + unit.kept, held - unit.made, 0, each.still_gathered, reduced))
        held -= unit.made
        gradients += 0 if accumulated else unit.kept
    return max(moments, key=lambda moment: moment.total)
