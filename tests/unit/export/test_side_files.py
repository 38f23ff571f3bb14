# SPDX-License-Identifier: Apache-2.0
"""What a result would come without is known before the training; what can be written is no news."""

import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoTokenizer

from llm_trainer.config.sections import ModelSettings
from llm_trainer.data.report import DataReport
from llm_trainer.export.manifest import begin_manifest
from llm_trainer.export.side_files import KnownParts, find_side_file_problems


@pytest.fixture
def base(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "base")


def find(base, name="rows.jsonl"):
    report = DataReport(files=[{"name": name, "bytes": 1}], formats={"train": "messages"}, num_rows=1)
    manifest = begin_manifest({"lora_r": 8}, {"train": report})
    config, tokenizer = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    return list(find_side_file_problems(KnownParts(base, config, tokenizer, ModelSettings(), manifest)))


@pytest.mark.parametrize("name", ["rows.jsonl", os.fsdecode(b"r\xf6ws.jsonl"), "a\n# b|c.jsonl"])
def test_what_can_be_written_is_no_news(base, name):
    (base / "LICENSES").mkdir()
    (base / "README.md").write_bytes(b"---\nlicense: mit\nlanguage: caf\xe9\n---\n")
    assert find(base, name) == []


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [(f"deep: {'[' * 60_000}", "are nested deeper than 32"), ("{ no: yaml", "are no YAML (")],
)
def test_a_card_whose_metadata_cannot_be_read_is_told(base, metadata, reason):
    (base / "README.md").write_text(f"---\nlicense: mit\n{metadata}\n---\n")
    (problem,) = find(base)
    assert problem.startswith(f"the metadata of {base}/README.md {reason}")
    assert problem.endswith("else the result's model card does not name the licence that they state.")


def test_a_licence_and_a_tokenizers_file_that_cannot_be_read_are_told_at_once(base):
    for name in ("LICENSE", "tokenizer_notes"):
        (base / name).symlink_to("/proc/self/mem")
    assert [problem.split(" (")[0] for problem in find(base)] == [
        "README.md and training_manifest.json could not be written after the training",
        "A copy of the base's tokenizer could not be written after the training",
    ]


def test_a_base_that_each_rank_fetches_for_itself_is_not_looked_at(base):
    config, tokenizer = AutoConfig.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    assert list(find_side_file_problems(KnownParts(Path("org/base"), config, tokenizer, ModelSettings(), {}))) == []
