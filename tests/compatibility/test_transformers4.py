# SPDX-License-Identifier: Apache-2.0
"""What the product writes computes in Transformers 4.57 what it computes here: logits, tokens, chats, special tokens.

Bases are taken as Transformers 4 stores them, and as Transformers 5 does. The older version reads in an environment of
its own, `.venv-transformers4`, which is made here from its hash-locked requirements.
"""

import json
import os
import site
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llm_trainer.config.schema import Settings
from llm_trainer.export.export import save_weights
from llm_trainer.merge.merge import write_merged_model
from llm_trainer.merge.plan import MergeRequest
from llm_trainer.model.lora_init import BaseReference, save_adapter
from llm_trainer.model.tokenizer_files import copy_tokenizer, make_readable, save_tokenizer
from support.older_transformers import MODELS, read_model

ROOT = Path(__file__).parents[2]
OLDER = ROOT / ".venv-transformers4"
SCRIPT = ROOT / "tests/support/older_transformers.py"
STORED_BY_5 = ("llama3", "gemma3", "gpt_neox")
KINDS = ("whole", "adapter", "merged")
# An adapter needs its base, and Transformers 4 reads such a base otherwise.
CASES = [(name, kind) for name in MODELS for kind in KINDS]
CASES += [(f"{name}-by-5", kind) for name in STORED_BY_5 for kind in ("whole", "merged")]
TEMPLATE_OF_JOB = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}<|extra|>{% endfor %}"

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def run_older(*arguments: str | Path) -> str:
    environment = {**os.environ, "SHARED_PACKAGES": site.getsitepackages()[0], "PYTHONPATH": ""}
    command = [OLDER / "bin/python", SCRIPT, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """The models as Transformers 4 stores them, and one as Transformers 5 does."""
    subprocess.run(["docker/venv.sh", OLDER.name, "transformers4", "--no-deps"], check=True, cwd=ROOT)
    folder = tmp_path_factory.mktemp("bases")
    run_older("make", folder)
    for name in STORED_BY_5:
        stored = folder / f"{name}-by-5"
        AutoModelForCausalLM.from_pretrained(folder / name).save_pretrained(stored)
        AutoTokenizer.from_pretrained(folder / name).save_pretrained(stored)
    return folder


def load_trained(base: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def write_whole(base: Path, folder: Path) -> str:
    """Write all weights as the export does; Transformers' Trainer gives the configs the tokenizer's special tokens."""
    model = load_trained(base)
    model.config.use_cache = False
    model.config.pad_token_id = model.generation_config.pad_token_id = 259
    trained = SimpleNamespace(
        trainer=SimpleNamespace(model=model),
        plan=SimpleNamespace(config=model.config, precision=SimpleNamespace(compute=torch.float32)),
        weights=None,
        base_folder=base,
        settings=Settings(),
        tokenizer=AutoTokenizer.from_pretrained(base),
    )
    save_weights(trained, folder)  # type: ignore[arg-type]
    save_tokenizer(AutoTokenizer.from_pretrained(base), base, folder, Settings().model)
    return str(folder)


def write_adapter(base: Path, folder: Path) -> str:
    """Write an adapter, with a chat template and a pad token of the job's."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    # Not its experts, each of which is a module in Transformers 4, and all of which are one parameter in 5.
    targets = ["q_proj", "v_proj"] if "moe" in base.name else "all-linear"
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2)
    save_adapter(adapted, folder, BaseReference(str(base), None), None)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token, tokenizer.chat_template = "<|extra|>", TEMPLATE_OF_JOB
    save_tokenizer(tokenizer, base, folder, Settings().model)
    return f"{base}:{folder}"


def write_merged(base: Path, folder: Path) -> str:
    adapter = folder.with_name(f"{base.name}-adapter")
    write_merged_model(MergeRequest(base, adapter, AutoConfig.from_pretrained(base)), folder)
    copy_tokenizer(adapter, folder)
    make_readable(folder)
    return str(folder)


@pytest.fixture(scope="module")
def readings(bases, tmp_path_factory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By model and kind: what Transformers 5 reads from a result, and what Transformers 4 does."""
    folder = tmp_path_factory.mktemp("results")
    writers = {"whole": write_whole, "adapter": write_adapter, "merged": write_merged}
    places = {}
    for base in sorted(bases.iterdir()):
        for kind in KINDS:
            target = folder / f"{base.name}-{kind}"
            target.mkdir()
            places[target.name] = writers[kind](base, target)
    ours = [read_model(place) for place in places.values()]
    theirs = [json.loads(line) for line in run_older("read", *places.values()).splitlines()]
    return dict(zip(places, zip(ours, theirs, strict=True), strict=True))


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_both_versions_read_the_same_model(readings, name, kind):
    ours, theirs = readings[f"{name}-{kind}"]
    torch.testing.assert_close(torch.tensor(theirs["logits"]), torch.tensor(ours["logits"]), rtol=1e-5, atol=1e-5)
    assert {**theirs, "logits": None} == {**ours, "logits": None}


def test_a_jobs_template_and_tokens_reach_both(readings):
    for kind in ("adapter", "merged"):
        for reading in readings[f"qwen2-{kind}"]:
            assert reading["chat"] == "[user] Hello <|im_end|> there<|extra|>[assistant] Hi!<|extra|>"
            assert reading["tokens"]["pad_token"] == "<|extra|>"
