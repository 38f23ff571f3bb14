# SPDX-License-Identifier: Apache-2.0
"""What products in float8 (`base_compute=fp8`) do to a real model's gradients, and to what a fine-tuning learns.

    .venv/bin/python bench/float8.py .demo/opt/ml/input/data/model [SEEDS]

SmolLM2-135M, LoRA r=8 on all linear layers, the demo's rows, one epoch in batches of 8, the loss on the answers, on a
CPU, where the products are emulated: their numbers are rounded as on a GPU. Cosines are those of the gradients of all
of an adapter's weights to float32's, over the first batches, with an adapter that has learnt a little. Each seed is an
adapter and an order of rows of its own. The loss is of rows that none has seen.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, get_cosine_schedule_with_warmup

from llm_trainer.model.layers.float8 import convert_base
from llm_trainer.model.layers.fused_adapters import fuse_adapters
from llm_trainer.model.lora import list_trained_layers

DATASET = Path(__file__).parent.parent / "examples/demo/dataset"
BATCH, LEARNING_RATE, COMPARED_BATCHES = 8, 2e-3, 4
WAYS = ("float32", "bfloat16", "float8")
Row = tuple[list[int], int]  # tokens, and how many of them are the question's
Batch = dict[str, torch.Tensor]


def main() -> None:
    folder, num_seeds = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, unseen = (read_rows(DATASET / f"{name}.jsonl", tokenizer) for name in ("train", "heldout"))
    compare_gradients(folder, rows)
    losses: dict[str, list[float]] = {way: [] for way in ("float32", "float8")}
    for seed in range(num_seeds):
        for way, found in losses.items():
            started = time.perf_counter()
            model = adapt(folder, way, seed)
            train(model, rows, seed)
            found.append(measure(model, unseen))
            print(
                f"seed {seed}, {way}: held-out loss {found[-1]:.4f}, {time.perf_counter() - started:.0f} s", flush=True
            )
    for way, found in losses.items():
        print(f"{way}: held-out loss {statistics.mean(found):.4f}, from {min(found):.4f} to {max(found):.4f}")


def read_rows(file: Path, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The chats of a file."""
    rows = []
    for line in file.read_text("utf-8").splitlines():
        messages = json.loads(line)["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        rows.append((whole, len(asked)))
    return rows


def make_batches(rows: list[Row]) -> Iterator[Batch]:
    """Batches of padded rows, in their order, with labels on the answers."""
    for first in range(0, len(rows), BATCH):
        chosen = rows[first : first + BATCH]
        length = max(len(tokens) for tokens, _ in chosen)
        tokens = torch.tensor([row + [0] * (length - len(row)) for row, _ in chosen])
        place = torch.arange(length)
        mask = torch.stack([place < len(row) for row, _ in chosen])
        answered = torch.stack([(place >= asked) & (place < len(row)) for row, asked in chosen])
        yield {"input_ids": tokens, "attention_mask": mask.long(), "labels": tokens.masked_fill(~answered, -100)}


def adapt(folder: str, way: str, seed: int) -> PeftModel:
    """The model with a new adapter, its base computing in this way."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    layers = list_trained_layers(base)
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    fuse_adapters(model)
    if way == "float8":
        convert_base(model, layers)
    return model


def train(model: PeftModel, rows: list[Row], seed: int) -> None:
    """One epoch."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, 3, math.ceil(len(rows) / BATCH))
    for batch in make_batches([rows[index] for index in order]):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


@torch.no_grad()
def measure(model: PeftModel, rows: list[Row]) -> float:
    """The mean loss of all labelled tokens."""
    model.eval()
    sums = [0.0, 0]
    for batch in make_batches(rows):
        count = int((batch["labels"][:, 1:] != -100).sum())
        sums = [sums[0] + count * model(**batch).loss.item(), sums[1] + count]
    return sums[0] / sums[1]


def compare_gradients(folder: str, rows: list[Row]) -> None:
    """Print how near the gradients of each way are to float32's."""
    model = adapt(folder, "float32", 0)
    train(model, rows[: 8 * BATCH], 0)  # a new adapter's A gets no gradient
    learnt = {name: weight.detach() for name, weight in model.named_parameters() if weight.requires_grad}
    batches = list(make_batches(rows[: COMPARED_BATCHES * BATCH]))
    exact = find_gradients(model, batches, "float32")
    for way in WAYS[1:]:
        other = adapt(folder, way, 0)
        other.load_state_dict(learnt, strict=False)
        pairs = list(zip(exact, find_gradients(other, batches, way), strict=True))
        print(f"{way}: {describe_nearness(pairs)}", flush=True)


def find_gradients(model: PeftModel, batches: list[Batch], way: str) -> list[dict[str, torch.Tensor]]:
    """The gradients of each batch, by the names of the weights, and its loss."""
    found = []
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16) if way == "bfloat16" else nullcontext():
            loss = model(**batch).loss
        loss.backward()
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        found.append({"loss": loss.detach(), **{name: weight.grad.flatten() for name, weight in weights.items()}})
        model.zero_grad()
    return found


def describe_nearness(pairs: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]) -> str:
    cosine = torch.nn.functional.cosine_similarity
    names = [name for name in pairs[0][0] if name != "loss"]
    whole = [cosine(*(torch.cat([side[name] for name in names]) for side in pair), dim=0).item() for pair in pairs]
    single = [cosine(a[name], b[name], dim=0).item() for a, b in pairs for name in names]
    lengths = [
        math.sqrt(sum(b[n].square().sum() for n in names) / sum(a[n].square().sum() for n in names)) for a, b in pairs
    ]
    losses = [(b["loss"] / a["loss"] - 1).item() for a, b in pairs]
    return (
        f"cosine of the whole gradient {statistics.mean(whole):.4f} (worst batch {min(whole):.4f}), of single matrices "
        f"{statistics.median(single):.4f} in the middle and {min(single):.4f} at worst, "
        f"length {statistics.mean(lengths):.3f}, loss {statistics.mean(losses):+.2%} of float32's"
    )


if __name__ == "__main__":
    main()
