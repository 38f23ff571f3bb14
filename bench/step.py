# SPDX-License-Identifier: Apache-2.0
"""A steady step of a job beside a bare PyTorch loop over the very batches that the job trained on.

    .venv/bin/python bench/step.py .demo/opt/ml [ROUNDS]

The loops are forward, backward, clipping and AdamW, of PEFT's model: `bare` has the LM head score every position, as
Transformers' models do, `labels` only those with a label, as our jobs do. Processes in turns; malloc keeps memory for
all of them.
"""

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from hooks import hook_worker, lay_hooks

from job import build, write_prompts

STEPS, WARM_UP = 15, 3
WAYS = ("job", "bare", "labels")
# The batches are the worker's own, before it trains.
HOOKS = hook_worker(
    "llm_trainer.export.manifest",  # imported when the class below is
    """
import atexit, os, time
from llm_trainer.training.methods.sft import ResumableSFTTrainer

batches, times, compute_loss = [], [], ResumableSFTTrainer.compute_loss

def call(self, model, inputs, *args, **kwargs):
    batches.append(dict(inputs))
    times.append(time.perf_counter())
    return compute_loss(self, model, inputs, *args, **kwargs)

def write():
    import torch
    torch.save({"batches": batches, "times": times}, os.environ["MEASURED"])

ResumableSFTTrainer.compute_loss = call
atexit.register(write)
""",
)
LOOP = """
import sys, time
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

model_path, measured, way = sys.argv[1:]
batches = torch.load(measured)["batches"]
model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
lora = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, lora).train()
weights = [weight for weight in model.parameters() if weight.requires_grad]
optimizer = torch.optim.AdamW(weights, lr=0.002)

def loss_of(batch):
    if way == "bare":
        return model(**batch, use_cache=False).loss
    causal, labels = model.get_base_model(), batch.pop("labels")[:, 1:]
    hidden = causal.model(**batch, use_cache=False).last_hidden_state[:, :-1]
    chosen = labels != -100
    return torch.nn.functional.cross_entropy(causal.lm_head(hidden[chosen]), labels[chosen])

times = []
for batch in batches:
    for name in ("num_tokens", "label_places", "shares_sequences", "is_padded"):
        batch.pop(name, None)
    times.append(time.perf_counter())
    loss_of(batch).backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()

torch.save({"times": times}, measured + "." + way)
"""


def main() -> None:
    model, rounds = Path(sys.argv[1]).absolute() / "input/data/model", int(sys.argv[2]) if len(sys.argv) > 2 else 5
    runs: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="bench-step-") as name:
            folder = Path(name)
            tokens = run_job(model, folder)
            for way in WAYS[1:]:
                kept = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
                run([sys.executable, "-c", LOOP, str(model), str(folder / "measured"), way], kept)
            for way in WAYS:
                runs[way].append(read_seconds(folder / ("measured" if way == "job" else f"measured.{way}")))
                print(f"{way}: {1000 * sum(runs[way][-1]) / tokens:.3f} ms a token", flush=True)
    for way in WAYS[1:]:
        ratios = [sum(job) / sum(own) - 1 for job, own in zip(runs["job"], runs[way], strict=True)]
        print(f"job beside {way}: {statistics.median(ratios):+.1%} ({min(ratios):+.1%} to {max(ratios):+.1%})")


def run_job(model: Path, folder: Path) -> int:
    """Train; the tokens of the steps that are counted."""
    command, variables = build("llm-trainer", model, write_prompts(folder / "train.jsonl"), folder / "output", folder)
    variables |= {**lay_hooks(folder, HOOKS), "MEASURED": str(folder / "measured")}
    options = {"max_steps": STEPS, "sample_prompts": 0, "save_steps": 10 * STEPS}
    run([*command, *(word for name, value in options.items() for word in (f"--{name}", str(value)))], variables)
    import torch

    batches = torch.load(folder / "measured")["batches"]
    return sum(int(batch["num_tokens"].sum()) for batch in batches[WARM_UP:-1])


def run(command: list[str], variables: dict[str, str]) -> None:
    finished = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(finished.stdout + finished.stderr)


def read_seconds(file: Path) -> list[float]:
    """Of each step after the first ones, from its beginning to that of the next."""
    import torch

    return [after - before for before, after in itertools.pairwise(torch.load(file)["times"][WARM_UP:])]


if __name__ == "__main__":
    main()
