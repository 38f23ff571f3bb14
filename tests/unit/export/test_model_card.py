# SPDX-License-Identifier: Apache-2.0
"""The card is one that the Hub reads, says what the manifest says, and its snippet runs."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from llm_trainer.export.base_source import BaseSource
from llm_trainer.export.model_card import build_model_card, find_licence

MANIFEST = {
    "llm_trainer": "0.1.0",
    "training_job_name": "sums: {{ 7 * 7 }}",
    "model": "/opt/ml/input/data/model",
    "settings": {
        "model_id": "/opt/ml/input/data/model",
        "lora_r": 8,
        "hub_token": "***",
        "train_dataset_path": "org/rows",
        "wandb_project": None,
    },
    "trainable_parameters": 10,
    "parameters": 1000,
    "adapter": {},
    "data": {
        "train": {
            "formats": {"train": "messages"},
            "num_rows": 240,
            "num_tokens": 16746,
            "supervised_share": 0.1965,
            "files": [
                {"name": "a|b.jsonl", "bytes": 45278, "sha256": "fa99"},
                {"name": "s.jsonl", "bytes": 7, "modified": 1},
            ],
        }
    },
    "lineage": [
        {"adapter": "/opt/ml/input/data/adapter", "sha256": "ab12", "training_job_name": "the_first", "num_steps": 40},
        {"adapter": "org/older", "sha256": "cd34", "training_job_name": None, "num_steps": [], "model": "org/base"},
    ],
    "metrics": {"eval_loss": 0.0424},
    "num_steps": 60,
    "total_steps": 60,
    "stopped": False,
    "world_size": 1,
    "export": {"largest_difference": 0.001},
    "versions": {"python": "3.11.7"},
}


def card_of(folder, base_folder="/nowhere", base_id="org/base", refusals=(), method="sft"):
    base = BaseSource(base_id, "abc" if base_id else None)
    manifest = {**MANIFEST, "settings": {**MANIFEST["settings"], "method": method}}
    return ModelCard(build_model_card(folder, manifest, Path(base_folder), base, list(refusals)))


def test_an_adapters_card(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    card = card_of(tmp_path)
    data = card.data.to_dict()
    assert data["base_model"] == "org/base"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert data["datasets"] == ["org/rows"]
    assert "license" not in data
    for part in (
        "licence was not found",
        "| eval_loss | 0.0424 |",
        "|  | ab12 | the_first | 40 |  |\n| org/older | cd34 |  | \\[\\] | org/base |",
        "a\\|b.jsonl | 45,278 | fa99 |",
        "16,746",
        "{{ 7 \\* 7 }}",
    ):
        assert part in card.text
    assert "largest_difference" in card.text
    assert "/opt/ml" not in card.content


def test_a_whole_models_card_of_a_base_without_a_name(tmp_path):
    card = card_of(tmp_path, base_id=None, refusals=["vLLM cannot."])
    data = card.data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert data["library_name"] == "transformers"
    assert "- vLLM cannot." in card.text
    assert "serving.properties" not in card.text


@pytest.mark.parametrize(
    ("file", "content", "licence"),
    [
        ("README.md", "---\nlicense: other\nlicense_name: x\n---\n", {"license": "other", "license_name": "x"}),
        ("README.md", "---\n{ no: yaml\n---\n", {}),
        ("README.md", "no front matter", {}),
        ("README.md", f"---\nlicense: mit\ndeep: {'[' * 60_000}\n---\n", {}),
        ("README.md", "---\nlicense: [mit]\nlicense_name: *nowhere\n---\n", {}),
        (
            "README.md",
            "---\ntags: [{license: gpl}, b]\n? [a, b]\n: c\nlicense: mit\n---\n---\nlicense: x\n---\n",
            {"license": "mit"},
        ),
        ("README.md", '---\nlicense: "a\\ud800"\n---\n', {}),
        ("README.md", '---\nlicense: "\\UFFFFFFFF"\n---\n', {}),
        ("README.md", "---\nlicense: a\nlanguage: caf\udce9\n---\n", {"license": "a"}),
        ("README.md", f"---\n%YAML 1.{'9' * 5_000}\n---\nlicense: mit\n", {}),
        ("LICENSES/Apache-2.0.txt", "Apache License", {"license": "other", "license_name": "LICENSES"}),
        ("LICENSE", "\0" * 500 + "mit license", {"license": "other", "license_name": "LICENSE"}),
        ("LICENSE", "   Apache License\n  Version 2.0", {"license": "apache-2.0"}),
        ("LICENSE.txt", "Our own terms", {"license": "other", "license_name": "LICENSE.txt"}),
    ],
)
def test_the_licence_is_the_bases_own(tmp_path, file, content, licence):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(content, errors="surrogateescape")
    assert find_licence(tmp_path) == licence


HOSTILE = (
    "x\n---\n# Evil\n[click](https://evil.example) <img src=a onerror=alert(1)> `code` | cell | **bold** ![i](u) "
    "www.evil.example \x1b[31m \u202e &lt; _slanted_ ```\n```\n<script>alert(2)</script>"
)


def test_names_that_others_chose_are_shown_as_they_are(tmp_path):
    data = MANIFEST["data"]["train"] | {"formats": {HOSTILE: "messages"}, "files": [{"name": HOSTILE, "bytes": 1}]}
    hostile = {
        "training_job_name": HOSTILE,
        "settings": {"run_name": HOSTILE, "note": [HOSTILE], "train_dataset_path": HOSTILE},
        "data": {HOSTILE: data},
        "metrics": {HOSTILE: 1.0},
        "export": {"proven": False, "reason": HOSTILE},
    }
    (tmp_path / "README.md").write_text(f"---\nlicense: other\nlicense_name: {json.dumps(HOSTILE)}\n---\n")
    base = BaseSource("org/base", HOSTILE)
    text = build_model_card(tmp_path, MANIFEST | hostile, tmp_path, base, [HOSTILE])
    assert not [character for character in ("\x1b", "\u202e") if character in text]
    card = ModelCard(text)
    assert card.data.to_dict().keys() == {
        *("base_model", "base_model_relation", "library_name", "pipeline_tag", "tags", "license", "license_name")
    }
    blocks = MarkdownIt("commonmark").enable("table").parse(card.text)
    words = [child for block in blocks if block.type == "inline" for child in block.children]
    shown = {"text", "link_open", "link_close", "strong_open", "strong_close", "code_inline", "softbreak"}
    assert {word.type for word in words} <= shown
    assert {word.content for word in words if word.type == "code_inline"} <= {"serving.properties", "serving.env"}
    assert [word.attrs["href"] for word in words if word.type == "link_open"] == ["https://huggingface.co/org/base"]
    assert not [block for block in blocks if block.type in ("html_block", "hr")]
    assert [block.tag for block in blocks if block.type == "heading_open"] == ["h1", "h2", "h2", "h2"]
    assert len([block for block in blocks if block.type == "td_open"]) == 5 + 3 + 2 + 2 * 5
    told = "".join(block.content for block in blocks if block.type == "inline")
    assert not re.search(r"https://evil|www\.", told)


def test_the_snippet_answers(tmp_path, tiny_model, monkeypatch):
    for file in tiny_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (code,) = re.findall(r"```python\n(.*?)```", card_of(tmp_path).text, re.DOTALL)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "__main__"})  # here, since a process of its own would import Transformers for seconds


def test_a_reward_models_card(tmp_path, tiny_model, monkeypatch, capsys):
    base = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1, pad_token_id=2)
    base.save_pretrained(tmp_path / "whole")
    get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for kind in ("whole", "lora"):
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / kind)
        card = card_of(tmp_path / kind, base_id=None, method="reward", refusals=["no"] * (kind == "lora"))
        assert card.data.to_dict()["pipeline_tag"] == "text-classification"
        assert "reward" in card.data.tags
        assert ("vllm serve . --runner pooling" in card.text) == (kind == "whole")
        (code,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
        monkeypatch.chdir(tmp_path / kind)
        exec(code.replace("path/to/the/base", str(tiny_model)), {"__name__": "__main__"})
        assert capsys.readouterr().out.startswith("reward: ")


def test_the_card_of_a_model_that_sees_loads_it_whole(tmp_path):
    base = BaseSource("org/base", "abc", sees_images=True)
    card = ModelCard(build_model_card(tmp_path, MANIFEST, Path("/nowhere"), base, []))
    assert card.data.to_dict()["pipeline_tag"] == "image-text-to-text"
    program = card.text.partition("```python\n")[2].partition("```")[0]
    assert "from transformers import AutoModelForImageTextToText, AutoProcessor" in program
    assert 'processor = AutoProcessor.from_pretrained(".")' in program
    assert "tokenizer" not in program and "image.png" not in program
    compile(program, "card", "exec")
    assert "image_url" not in card.text


def test_the_card_of_a_model_trained_on_images_shows_a_request_with_one(tmp_path):
    base = BaseSource("org/base", "abc", sees_images=True)
    data = {"train": {**MANIFEST["data"]["train"], "num_images": 3}}
    card = build_model_card(tmp_path, {**MANIFEST, "data": data}, Path("/nowhere"), base, [])
    program, request = (card.partition(f"```{kind}\n")[2].partition("```")[0] for kind in ("python", "json"))
    assert '[{"type": "image", "path": "path/to/an/image.png"}, {"type": "text", "text": "Hello"}]' in program
    compile(program, "card", "exec")
    (message,) = json.loads(request)["messages"]
    assert [part["type"] for part in message["content"]] == ["image_url", "text"]
    assert "`limit_mm_per_prompt` in these files says how many" in card
