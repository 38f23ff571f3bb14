# SPDX-License-Identifier: Apache-2.0
"""Limits of vLLM on adapters: which ones AWS's LMI container, which serves with vLLM, cannot load.

Sources: the code of djl-serving (LMI v27) and of vLLM 0.23.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llm_trainer.config.sections import MOVING_STARTS, AdapterSettings

if TYPE_CHECKING:
    from peft import LoraConfig

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values that vLLM takes as max_lora_rank
# Families whose class in vLLM names its embeddings as places for adapters.
ADAPTABLE_EMBEDDINGS = frozenset(
    {"llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "granite", "granitemoe", "granitemoehybrid", "apertus"}
    | {"nemotron", "jamba", "bamba", "cohere", "cohere2", "exaone4", "falcon_h1", "lfm2", "minicpm", "phimoe"}
)
# Families for whose fused experts vLLM reads an adapter in the layout that PEFT stores.
ADAPTABLE_EXPERTS = frozenset({"gpt_oss", "qwen3_5_moe_text", "qwen3_vl_moe_text"})
SUBJECT = "vLLM and LMI cannot load this adapter"
FIX = "set merge_weights=true to serve it there."


def find_adapter_refusals(lora: "LoraConfig", model_type: str, sees: bool = False) -> Iterator[str]:
    """Yield a sentence for each property of an adapter that vLLM, and with it LMI, cannot load.

    `sees` tells whether the adapter also sits on what the model sees images with.
    """
    if sees:
        yield f"{SUBJECT}: it sits on the vision tower, too, where vLLM leaves it out; {FIX}"
    if lora.modules_to_save:
        yield f"{SUBJECT}: it holds whole modules ({', '.join(lora.modules_to_save)}); {FIX}"
    if lora.use_dora:
        yield f"{SUBJECT}: it is a DoRA adapter (use_dora=true); {FIX}"
    if lora.bias != "none":
        yield f"{SUBJECT}: it trains biases (bias={lora.bias}); {FIX}"
    if lora.rank_pattern or lora.alpha_pattern:
        yield f"{SUBJECT}: its matrices differ in rank or alpha, and vLLM reads one of each; {FIX}"
    rank = find_largest_rank(lora)
    if find_served_rank(rank) is None:
        yield f"{SUBJECT}: its rank is {rank} and at most {LORA_RANKS[-1]} is possible; lower lora_r, or {FIX}"
    yield from find_placement_refusals(lora, model_type)


def find_placement_refusals(lora: "LoraConfig", model_type: str) -> Iterator[str]:
    """Yield the sentences of `find_adapter_refusals` that depend only on where in the model the adapter sits.

    They are known before the training.
    """
    embeddings = {"embed_tokens", "lm_head", "wte"} & {name.rpartition(".")[2] for name in lora.target_modules or ()}
    if embeddings and model_type not in ADAPTABLE_EMBEDDINGS:
        yield f"{SUBJECT}: it sits on {', '.join(sorted(embeddings))}, which vLLM adapts in no {model_type}; {FIX}"
    experts = [name for name in lora.target_parameters or () if "experts" in name]
    others = [name for name in lora.target_parameters or () if "experts" not in name]
    if others:
        yield f"{SUBJECT}: it sits on parameters that are no experts ({', '.join(others)}); {FIX}"
    if experts and model_type not in ADAPTABLE_EXPERTS:
        yield f"{SUBJECT}: it sits on fused experts ({', '.join(experts)}), which vLLM adapts in no {model_type}; {FIX}"
    elif len(experts) == 1:
        yield f"{SUBJECT}: it sits on {experts[0]} alone, and vLLM adapts all or none of the experts' parameters; {FIX}"


def find_settings_refusals(settings: AdapterSettings, merge_weights: bool) -> Iterator[str]:
    """Yield a sentence for each setting that already excludes serving the adapter with vLLM.

    Yields nothing where the result has no separate adapter, because all weights are trained or merged.
    """
    if not settings.use_peft or merge_weights:
        return
    if settings.train_vision:
        yield f"train_vision=true: vLLM and LMI leave out what an adapter learns in the vision tower; {FIX}"
    if settings.use_dora:
        yield f"use_dora=true: vLLM and LMI cannot load DoRA adapters; {FIX}"
    # These initial values change the base. The export stores the difference, which has twice the rank.
    is_doubled = settings.init_lora_weights in (*MOVING_STARTS, "loftq")
    rank = settings.lora_r * (2 if is_doubled else 1)
    if find_served_rank(rank) is None:
        exported = f", exported as {rank} with init_lora_weights={settings.init_lora_weights}" if is_doubled else ""
        yield (
            f"lora_r={settings.lora_r}{exported}: vLLM and LMI load adapters of rank {LORA_RANKS[-1]} at most; "
            f"lower it, or {FIX}"
        )


def find_largest_rank(lora: "LoraConfig") -> int:
    """Return the largest rank of an adapter's matrices."""
    return max([lora.r, *lora.rank_pattern.values()])


def find_served_rank(rank: int) -> int | None:
    """Return the smallest max_lora_rank that holds a rank, or None. vLLM reserves memory for that rank."""
    return next((allowed for allowed in LORA_RANKS if allowed >= rank), None)
