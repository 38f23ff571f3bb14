# SPDX-License-Identifier: Apache-2.0
"""The same fine-tuning as a whole process: this project, `trl sft`, the script a user writes, and the best TRL script.

    .venv/bin/python bench/job.py .demo/opt/ml [ROUNDS] [METHOD]

SmolLM2-135M, LoRA r=8 on all linear layers, the demo's rows, one epoch, float32, batches of 8, the loss on the answers;
each a process of its own, in turns. The loss and accuracy are measured by one program on rows that none has seen. Each
round has a seed of its own: with 30 steps it decides more over them than the way does.

METHOD dpo trains a new adapter on the demo's pairs, in this project and in the script a user writes. Its accuracy is
the share of held-out pairs that are ranked right.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
DATASET = HERE.parent / "examples/demo/dataset"
PAIRS = HERE.parent / "examples/demo/pairs"
LORA = {"lora_r": 8, "lora_alpha": 32, "lora_dropout": 0.0}
ARGUMENTS = {
    "learning_rate": 0.002,
    "lr_scheduler_type": "cosine",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "max_length": 256,
    "logging_steps": 5,
}
DPO_ARGUMENTS = {**ARGUMENTS, "learning_rate": 0.001, "per_device_train_batch_size": 4}
WAYS = {
    "sft": ("llm-trainer", "trl sft", "plain script", "tuned script"),
    "dpo": ("llm-trainer", "plain_dpo script"),
}


def main() -> None:
    tree, rounds = Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 5
    method = sys.argv[3] if len(sys.argv) > 3 else "sft"
    model, ways = tree / "input/data/model", WAYS[method]
    results: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(prefix="bench-job-") as name:
        folder = Path(name)
        data = write_prompts(folder / "train.jsonl") if method == "sft" else PAIRS / "train.jsonl"
        num_tokens = count_tokens(model, data)
        for number in range(rounds):
            for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
                output = folder / "output"
                run = measure(*build(way, model, data, output, folder, number, method), folder / "log.txt")
                adapter = output / "model" if way == "llm-trainer" else output
                results[way].append({**run, **examine(model, adapter, method)})
                shutil.rmtree(output)
                print(way, {key: round(value, 3) for key, value in results[way][-1].items()}, flush=True)
    report(results, num_tokens)


def write_prompts(file: Path) -> Path:
    """The rows as prompts and completions, on which alone TRL then trains."""
    rows = [json.loads(line)["messages"] for line in (DATASET / "train.jsonl").read_text("utf-8").splitlines()]
    lines = [json.dumps({"prompt": row[:-1], "completion": row[-1:]}) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def build(
    way: str, model: Path, data: Path, output: Path, folder: Path, seed: int = 42, method: str = "sft"
) -> tuple[list[str], dict[str, str]]:
    """The command of a way, and the variables that it adds."""
    own = DPO_ARGUMENTS if method == "dpo" else ARGUMENTS
    binaries, arguments = Path(sys.executable).parent, {**LORA, **own, "seed": seed}
    if way == "llm-trainer":
        tree = output
        (tree / "input/config").mkdir(parents=True)
        (tree / "input/data").mkdir()
        (tree / "input/data/model").symlink_to(model)
        (tree / "input/data/train").mkdir()
        shutil.copy(data, tree / "input/data/train")
        given = {"method": method, **{key: str(value) for key, value in arguments.items()}}
        (tree / "input/config/hyperparameters.json").write_text(json.dumps(given))
        return [str(binaries / "llm-trainer"), "train"], {"SAGEMAKER_BASE_DIR": str(tree)}
    if way == "trl sft":
        rows = folder / "rows"
        rows.mkdir(exist_ok=True)
        shutil.copy(data, rows / "train.jsonl")
        flags = {**arguments, "dtype": "float32", "bf16": "false", "use_cpu": "true", "report_to": "none"}
        flags |= {"model_name_or_path": model, "dataset_name": rows, "output_dir": output, "use_peft": "true"}
        flags |= {"lora_target_modules": "all-linear", "save_strategy": "no", "eval_strategy": "no"}
        return [
            str(binaries / "trl"),
            "sft",
            *(str(word) for item in flags.items() for word in (f"--{item[0]}", item[1])),
        ], {}
    script = HERE / "opponents" / f"{way.split()[0]}.py"
    return [sys.executable, str(script), str(model), str(data), str(output), json.dumps(arguments)], {}


def measure(command: list[str], variables: dict[str, str], log: Path) -> dict[str, float]:
    """Wall and CPU seconds of a process and its children, and the peak of their memory, shared pages counted once."""
    before = os.times()
    started = time.perf_counter()
    with log.open("w") as stream:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=stream, stderr=subprocess.STDOUT)
    peak = Peak(process.pid)
    process.wait()
    seconds = time.perf_counter() - started
    peak.end()
    after = os.times()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{log.read_text()[-3000:]}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_gib": peak.bytes / 2**30}


class Peak:
    """The highest sum of proportional set sizes of a process and its descendants, looked at every second."""

    def __init__(self, pid: int) -> None:
        self.process, self.bytes, self.is_over = psutil.Process(pid), 0, False
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()

    def watch(self) -> None:
        while not self.is_over:
            total = 0
            try:
                for process in [self.process, *self.process.children(recursive=True)]:
                    total += process.memory_full_info().pss
            except psutil.Error:  # one has ended in the meantime
                pass
            self.bytes = max(self.bytes, total)
            time.sleep(1)

    def end(self) -> None:
        self.is_over = True
        self.thread.join()


def examine(model: Path, adapter: Path, method: str = "sft") -> dict[str, Any]:
    """Loss a token and accuracy of an adapter on the held-out rows, by a process of its own.

    The loss is that of the answers up to the token that ends them: TRL also trains the line break after it, which no
    one generates.
    """
    command = [sys.executable, __file__, "--examine", str(model), str(adapter), method]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        sys.exit(run.stderr)
    return json.loads(run.stdout.splitlines()[-1])


def rank_here(model: Path, adapter: Path) -> dict[str, float]:
    sys.path.insert(0, str(HERE.parent / "examples/demo"))
    from evaluate import read_rows
    from rank import ranked_right

    return {"accuracy": ranked_right(model, read_rows(PAIRS / "heldout.jsonl"), adapter)}


def examine_here(model: Path, adapter: Path) -> dict[str, float]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sys.path.insert(0, str(HERE.parent / "examples/demo"))
    from evaluate import accuracy, read_rows

    rows = read_rows(DATASET / "heldout.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(model)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), adapter)
    loss, count = 0.0, 0
    for line in (DATASET / "heldout.jsonl").read_text("utf-8").splitlines():
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        while whole[-1] != tokenizer.eos_token_id:
            whole.pop()
        labels = torch.tensor([[-100] * len(prompt) + whole[len(prompt) :]])
        with torch.no_grad():
            loss += float(adapted(torch.tensor([whole]), labels=labels).loss) * (len(whole) - len(prompt))
        count += len(whole) - len(prompt)
    return {"heldout_loss": loss / count, "accuracy": accuracy(model, rows, adapter)}


def count_tokens(model: Path, data: Path) -> int:
    """The tokens of all rows, without padding."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    answers = ("completion", "chosen", "rejected")
    chats = [row["prompt"] + row[answer] for row in rows for answer in answers if answer in row]
    return sum(len(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"]) for chat in chats)


def report(results: dict[str, list[dict[str, float]]], num_tokens: int) -> None:
    """Medians, and in brackets the least and the most; of this project's time beside each, round by round."""
    print(
        "| | wall, s | of which this project takes | tokens/s | CPU, s | peak memory, GiB | held-out loss | accuracy |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for way, runs in results.items():
        pairs = zip(results["llm-trainer"], runs, strict=True)
        columns = [
            show([run["seconds"] for run in runs], 1),
            show([own["seconds"] / other["seconds"] for own, other in pairs], 2),
            show([num_tokens / run["seconds"] for run in runs], 0),
            show([run["cpu_seconds"] for run in runs], 0),
            show([run["peak_gib"] for run in runs], 2),
            show([run["heldout_loss"] for run in runs], 4) if "heldout_loss" in runs[0] else "",
            show([run["accuracy"] for run in runs], 2),
        ]
        print(f"| {way} | {' | '.join(columns)} |")


def show(values: list[float], digits: int) -> str:
    middle, least, most = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} to {most})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--examine"]:
        examination = rank_here if sys.argv[4] == "dpo" else examine_here
        print(json.dumps(examination(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main()
