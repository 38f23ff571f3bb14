# SPDX-License-Identifier: Apache-2.0
"""The estimate of a step's memory beside what real steps took: each case in a process of its own.

    .venv/bin/python bench/memory.py [WORD ...]

runs the cases whose name holds one of the words, or all. On a CPU what is measured is the highest resident set above
that before the weights were made, on a GPU torch's peak.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SMOLLM2 = {  # SmolLM2-135M
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
WIDE = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
FULL: dict[str, Any] = {"use_peft": False}
CHECKPOINTED = {"gradient_checkpointing": True}
BF16 = {"torch_dtype": "bfloat16"}
DPO: dict[str, Any] = {"method": "dpo", "lora_dropout": 0.0}
EAGER = {"attn_implementation": "eager"}
VISION: dict[str, Any] = {"train_vision": True}
IMAGE_SIZE = 640, 480
# name -> kind of the model, rows with an image each, settings
IMAGE_CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    f"{model} {way} {rows} rows{' checkpointed' if checkpoints else ''}": (
        kind,
        rows,
        {**options, **(CHECKPOINTED if checkpoints else {})},
    )
    for model, kind in (("smolvlm", "idefics"), ("qwen2-vl", "qwen"))
    for way, options in {
        "lora": {},
        "full": FULL,
        "lora vision": VISION,
        "full vision": {**FULL, **VISION},
    }.items()
    for rows, checkpoints in ((1, False), (2, True))
}
# name -> model, sequences, tokens of each, settings
CASES: dict[str, tuple[dict[str, Any], int, int, dict[str, Any]]] = {
    "smol lora 1x256": (SMOLLM2, 1, 256, {}),
    "smol lora 4x256": (SMOLLM2, 4, 256, {}),
    "smol lora 4x256 checkpointed": (SMOLLM2, 4, 256, CHECKPOINTED),
    "smol lora 2x512 eager": (SMOLLM2, 2, 512, EAGER),
    "smol lora 2x512 bf16": (SMOLLM2, 2, 512, BF16),
    "smol lora 1x1024 checkpointed": (SMOLLM2, 1, 1024, CHECKPOINTED),
    "smol full 1x256": (SMOLLM2, 1, 256, FULL),
    "smol full 4x256": (SMOLLM2, 4, 256, FULL),
    "smol full 4x256 checkpointed": (SMOLLM2, 4, 256, {**FULL, **CHECKPOINTED}),
    "smol full 2x256 bf16": (SMOLLM2, 2, 256, {**FULL, **BF16}),
    "smol dpo lora 4x256": (SMOLLM2, 4, 256, DPO),
    "smol dpo full 4x256": (SMOLLM2, 4, 256, {**FULL, **DPO}),
    "wide lora 1x512": (WIDE, 1, 512, {}),
    "wide lora 2x512 bf16": (WIDE, 2, 512, BF16),
    "wide lora 2x512 checkpointed": (WIDE, 2, 512, CHECKPOINTED),
    "wide full 1x512": (WIDE, 1, 512, FULL),
    "wide full 1x512 checkpointed": (WIDE, 1, 512, {**FULL, **CHECKPOINTED}),
}
IMAGE_ROW = {
    "messages": [
        {"role": "user", "content": "<image>What is there to see, and where?"},
        {"role": "assistant", "content": "Dots of all colours, all over the picture."},
    ],
    "images": ["0.png"],
}
# kind -> sizes of its processor's images
PROCESSORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "idefics": ({"size": {"longest_edge": 1024}, "max_image_size": {"longest_edge": 512}}, {"image_seq_len": 64}),
    "qwen": ({"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}}, {}),
}
TOWER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 6, "num_attention_heads": 12}
STEPS = 2
VARIABLES = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def main(words: list[str]) -> None:
    print(f"{'case':32} {'estimate':>9} {'measured':>9}  ratio   (MiB)")
    for name in (*CASES, *IMAGE_CASES):
        if not words or any(word in name for word in words):
            run = subprocess.run(
                [sys.executable, __file__, "--case", name], capture_output=True, text=True, env=VARIABLES
            )
            if run.returncode:
                print(f"{name:32} failed: {run.stderr.strip().splitlines()[-1]}")
                continue
            estimated, measured = json.loads(run.stdout.splitlines()[-1])
            print(
                f"{name:32} {estimated / 2**20:9.0f} {measured / 2**20:9.0f}  {estimated / measured:5.3f}", flush=True
            )


def measure(name: str) -> tuple[int, int]:
    """(estimated, measured) bytes of a case."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, LlamaConfig
    from trl import DPOConfig, SFTConfig, SFTTrainer

    from llm_trainer.config.schema import Settings
    from llm_trainer.model import lora
    from llm_trainer.model.memory.estimate import Setup, estimate_memory
    from llm_trainer.model.memory.peak import Peak
    from llm_trainer.model.memory.shape import read_shape
    from llm_trainer.model.memory.step_trace import Step

    model_options, sequences, length, options = CASES[name]
    settings = Settings(**{"lora_dropout": 0.1, **options})
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if settings.model.torch_dtype == "bfloat16" else torch.float32
    config = LlamaConfig(pad_token_id=0, **model_options)
    checkpoints = bool(settings.parallelism.gradient_checkpointing)
    shape = read_shape(config, settings.model, settings.adapter, dtype)
    step = Step(
        num_sequences=sequences,
        length=length,
        has_mask=False,
        stores_scores=settings.model.attn_implementation == "eager",
        compute_dtype=dtype,
        recompute_activations=checkpoints,
        offload_activations=False,
        sharded=False,
        on_gpu=on_gpu,
    )
    estimated = estimate_memory(shape, Setup(step, 1, "adamw_torch_fused", accumulates=False))
    for part in estimated.as_table():
        print(part, file=sys.stderr)
    peak = Peak(torch.device("cuda" if on_gpu else "cpu"))
    attention = "eager" if settings.model.attn_implementation == "eager" else "sdpa"
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    row = {"input_ids": [5] * length, "labels": [5] * length}
    is_dpo = settings.data.method == "dpo"
    if is_dpo:
        row = {name: ids * 2 for name, ids in row.items()} | {"seq_lengths": [length, length]}
    batch = sequences // settings.data.sequences_a_row
    rows = Dataset.from_list([{**row, "row": number} if is_dpo else row for number in range(batch * STEPS)])
    lora_config = lora.build_lora_config(settings.model, settings.adapter, model) if settings.adapter.use_peft else None
    with tempfile.TemporaryDirectory() as folder:
        own = {} if is_dpo else {"dataset_kwargs": {"skip_prepare_dataset": True}}
        arguments = (DPOConfig if is_dpo else SFTConfig)(
            output_dir=folder,
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            max_steps=STEPS,
            gradient_checkpointing=checkpoints,
            bf16=dtype == torch.bfloat16,
            use_cpu=not on_gpu,
            max_length=None,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **own,
        )
        if is_dpo:
            train_pairs(model, arguments, rows, lora_config)
        else:
            tokenizer = build_tokenizer()
            SFTTrainer(
                model, arguments, train_dataset=rows, processing_class=tokenizer, peft_config=lora_config
            ).train()
    return estimated.peak_bytes, peak.read_bytes()


def measure_images(name: str) -> tuple[int, int]:
    """(estimated, measured) bytes of a case with images, trained as a job does it on a CPU."""
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
    import torch
    from transformers import AutoModelForImageTextToText

    from llm_trainer.config.schema import Settings
    from llm_trainer.data.images.collator import ImageCollator
    from llm_trainer.data.images.row_images import find_row_images
    from llm_trainer.model import lora
    from llm_trainer.model.device import find_device
    from llm_trainer.model.kinds.tower import freeze_tower
    from llm_trainer.model.memory.fit import MemoryPlan
    from llm_trainer.model.memory.peak import Peak
    from llm_trainer.model.memory.scenario import (
        MemoryScenario,
        MemorySettings,
        Target,
        list_parallelism_plans,
    )
    from llm_trainer.readers.images import ImageRules
    from llm_trainer.training.batches.run_batches import find_run_batches
    from llm_trainer.training.methods import choose_method
    from llm_trainer.training.trainer_config import TrainerParts, build_arguments, build_trainer
    from support.image_rows import build_vocabulary, prepare_rows
    from support.tiny_processors import draw
    from support.trainers import build_run_context, collect_sources

    kind, num_rows, options = IMAGE_CASES[name]
    settings = Settings(
        **{"gradient_checkpointing": False, "per_device_train_batch_size": num_rows, "max_steps": STEPS, **options}
    )
    cpu = find_device(use_cpu=True)
    with tempfile.TemporaryDirectory() as folder:
        draw(*IMAGE_SIZE).save(os.path.join(folder, "0.png"))
        vocabulary = build_vocabulary(kind, Path(folder), *PROCESSORS[kind])
        rows, report = prepare_rows(vocabulary, [IMAGE_ROW] * (num_rows * STEPS), Path(folder))
        collator = ImageCollator(vocabulary.images, ImageRules(10**8), vocabulary.tokenizer.pad_token_id)
        config = build_mid_config(kind, vocabulary)
        parts = settings.model, settings.adapter, settings.data, settings.training, settings.parallelism
        scenario = MemoryScenario(
            config,
            MemorySettings(*parts),
            report.longest_row_tokens,
            Target(cpu, 1, 2**40),
            images=find_row_images([rows], vocabulary.images, settings.data),
        )
        (way,) = list_parallelism_plans(scenario.settings, scenario.target)
        plan = MemoryPlan(way, scenario.estimate(way), "", shape=scenario.shape)
        arguments = build_arguments(
            choose_method(), collect_sources(settings, Path(folder)), cpu.torch, torch.float32, plan
        )
        peak = Peak(cpu.torch)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        if not settings.adapter.train_vision:
            freeze_tower(model)
        lora_config = lora.build_lora_config(*parts[:2], model) if settings.adapter.use_peft else None
        trainer = build_trainer(
            choose_method(),
            TrainerParts(model, vocabulary.tokenizer, arguments, {"train": rows}, collator, lora_config),
            build_run_context(),
            patience=None,
        )
        trainer.train_from(None)
        measured = peak.read_bytes()
        batches = find_run_batches(trainer, 0, report.supervised_share)
        expected = plan.expect_peak(scenario, batches.largest)
        for part in expected.as_table():
            print(part, file=sys.stderr)
    return expected.peak_bytes, measured


def train_pairs(model: Any, arguments: Any, rows: Any, lora_config: Any) -> None:
    """Train on pairs as a job does, with a reference."""
    from llm_trainer.training.methods import choose_method
    from llm_trainer.training.trainer_config import TrainerParts, build_trainer

    tokenizer = build_tokenizer()
    from support.trainers import build_run_context

    parts = TrainerParts(model, tokenizer, arguments, {"train": rows}, None, lora_config)
    build_trainer(choose_method("dpo"), parts, build_run_context(), patience=None).train_from(None)


def build_mid_config(kind: str, vocabulary: Any) -> Any:
    """The config of SmolVLM's or Qwen2-VL's architecture: SmolLM2's width and SmolVLM's tower, not as deep."""
    from support.tiny_vision_models import build_config

    config = build_config(kind, vocabulary.images.processor)
    text = config.get_text_config()
    for name, value in {**SMOLLM2, "num_hidden_layers": 12, "max_position_embeddings": 8192}.items():
        setattr(text, name, value)
    if hasattr(text, "layer_types"):
        text.layer_types = ["full_attention"] * text.num_hidden_layers
    if kind == "idefics":
        for name, value in {**TOWER, "image_size": 512, "patch_size": 16}.items():
            setattr(config.vision_config, name, value)
        config.scale_factor = 4
    else:
        vision = {"embed_dim": 768, "hidden_size": 576, "depth": 6, "num_heads": 12, "mlp_ratio": 4}
        for name, value in vision.items():
            setattr(config.vision_config, name, value)
        text.rope_parameters["mrope_section"] = [8, 12, 12]
    config.tie_word_embeddings = True
    return config


def build_tokenizer() -> Any:
    sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "tests"))
    from support.tiny_model import build_tokenizer as build

    return build()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps((measure if sys.argv[2] in CASES else measure_images)(sys.argv[2])))
    else:
        main(sys.argv[1:])
