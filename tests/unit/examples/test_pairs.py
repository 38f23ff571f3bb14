# SPDX-License-Identifier: Apache-2.0
"""The demo's pairs are those that their program makes, and none that are held out can be known from training."""

import json
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).parents[3] / "examples/demo"


def read_prompts(file):
    return {json.loads(line)["prompt"][0]["content"] for line in (DEMO / "pairs" / file).read_text().splitlines()}


def test_the_program_writes_the_same_bytes(tmp_path):
    subprocess.run([sys.executable, DEMO / "make_pairs.py", "--output", tmp_path], check=True)
    written, kept = (
        {path.name: path.read_bytes() for path in folder.iterdir()} for folder in (tmp_path, DEMO / "pairs")
    )
    assert written.keys() == {"README.md", "heldout.jsonl", "train.jsonl", "validation.jsonl"}
    assert written == kept


def test_no_held_out_prompt_is_trained_on():
    held_out = read_prompts("heldout.jsonl")
    assert len(held_out) == 100
    assert held_out.isdisjoint(read_prompts("train.jsonl") | read_prompts("validation.jsonl"))


def test_neither_the_longer_nor_the_shorter_line_is_always_right():
    rows = [json.loads(line) for line in (DEMO / "pairs/heldout.jsonl").read_text().splitlines()]
    longer = [len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in rows]
    assert sum(longer) == len(longer) / 2
    assert longer == [row["detail"] for row in rows]
