# SPDX-License-Identifier: Apache-2.0
"""What vLLM in AWS's LMI container cannot load of an adapter."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llm_trainer.config.schema import Settings
from llm_trainer.config.sections import MOVING_STARTS

if TYPE_CHECKING:
    from peft import LoraConfig

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank may be
# Families whose class in vLLM names its embeddings as places for adapters.
ADAPTABLE_EMBEDDINGS = frozenset(
    {"llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "granite", "granitemoe", "granitemoehybrid", "apertus"}
    | {"nemotron", "jamba", "bamba", "cohere", "cohere2", "exaone4", "falcon_h1", "lfm2", "minicpm", "phimoe"}
)
# Families whose fused experts vLLM takes an adapter of as PEFT stores it.
ADAPTABLE_EXPERTS = frozenset({"gpt_oss", "qwen3_5_moe_text", "qwen3_vl_moe_text"})
FIX = "set merge_weights=true to serve it there."


def find_refusals(lora: "LoraConfig", model_type: str) -> Iterator[str]:
    """Sentences on what of an adapter vLLM, and LMI with it, cannot load."""
    where = "vLLM and LMI cannot load this adapter"
    if lora.modules_to_save:
        yield f"{where}: it holds whole modules ({', '.join(lora.modules_to_save)}); {FIX}"
    if lora.use_dora:
        yield f"{where}: it is a DoRA adapter (use_dora=true); {FIX}"
    if lora.bias != "none":
        yield f"{where}: it trains biases (bias={lora.bias}); {FIX}"
    if lora.rank_pattern or lora.alpha_pattern:
        yield f"{where}: its matrices differ in rank or alpha, and vLLM reads one of each; {FIX}"
    rank = find_rank(lora)
    if find_served_rank(rank) is None:
        yield f"{where}: its rank is {rank} and at most {LORA_RANKS[-1]} is possible; lower lora_r, or {FIX}"
    yield from find_misplacements(lora, model_type)


def find_misplacements(lora: "LoraConfig", model_type: str) -> Iterator[str]:
    """Those of the sentences that depend on where in the model the adapter sits, known before the training."""
    where = "vLLM and LMI cannot load this adapter"
    embeddings = {"embed_tokens", "lm_head", "wte"} & {name.rpartition(".")[2] for name in lora.target_modules or ()}
    if embeddings and model_type not in ADAPTABLE_EMBEDDINGS:
        yield f"{where}: it sits on {', '.join(sorted(embeddings))}, which vLLM adapts in no {model_type}; {FIX}"
    experts = [name for name in lora.target_parameters or () if "experts" in name]
    others = [name for name in lora.target_parameters or () if "experts" not in name]
    if others:
        yield f"{where}: it sits on parameters that are no experts ({', '.join(others)}); {FIX}"
    if experts and model_type not in ADAPTABLE_EXPERTS:
        yield f"{where}: it sits on fused experts ({', '.join(experts)}), which vLLM adapts in no {model_type}; {FIX}"
    elif len(experts) == 1:
        yield f"{where}: it sits on {experts[0]} alone, and vLLM adapts all or none of the experts' parameters; {FIX}"


def find_limits(settings: Settings) -> Iterator[str]:
    """The same as far as settings alone tell it, before the training."""
    if not settings.adapter.use_peft or settings.output.merge_weights:
        return
    if settings.adapter.use_dora:
        yield f"use_dora=true: vLLM and LMI cannot load DoRA adapters; {FIX}"
    doubled = settings.adapter.init_lora_weights in (
        *MOVING_STARTS,
        "loftq",
    )  # the difference from the start is exported
    rank = settings.adapter.lora_r * (2 if doubled else 1)
    if find_served_rank(rank) is None:
        twice = f", exported as {rank} with init_lora_weights={settings.adapter.init_lora_weights}" if doubled else ""
        yield (
            f"lora_r={settings.adapter.lora_r}{twice}: vLLM and LMI load adapters of rank {LORA_RANKS[-1]} at most; "
            f"lower it, or {FIX}"
        )


def find_rank(lora: "LoraConfig") -> int:
    return max([lora.r, *lora.rank_pattern.values()])


def find_served_rank(rank: int) -> int | None:
    """The smallest max_lora_rank that takes the rank: vLLM sets memory aside for it."""
    return next((allowed for allowed in LORA_RANKS if allowed >= rank), None)
