# SPDX-License-Identifier: Apache-2.0
"""Splits of a job: which sources they have, what is wrong with all of them together, and what comes back from JSON."""

import json
from types import SimpleNamespace

import pytest

from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import Vocabulary
from llm_trainer.data.splits import Split, list_sources, prepare_splits
from llm_trainer.data.streaming import SourceHead
from llm_trainer.readers.sources import FileSource
from support.image_rows import ROWS, build_vocabulary, save_pictures
from support.tiny_model import build_tokenizer

TOKENIZER = build_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER, frozenset({TOKENIZER.eos_token_id}), len(TOKENIZER))


@pytest.fixture
def make_source(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))

    def make(name, *texts, rows=()):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in [*({"text": text} for text in texts), *rows]))
        return FileSource(name, tmp_path, (file,))

    return make


def prepare(tmp_path, train, validation=(), **settings):
    inputs = SimpleNamespace(train=train, validation=list(validation))
    return prepare_splits(inputs, VOCABULARY, Settings(**settings).data, tmp_path / "rejected_rows.jsonl")


def test_a_split_without_sources_is_none_and_a_stream_is_audited_by_its_heads(make_source):
    inputs = SimpleNamespace(train=[make_source("train", "a")], validation=[])
    assert list_sources(inputs, streaming=False) == {"train": inputs.train}
    assert list_sources(inputs, streaming=True) == {"train": [SourceHead(inputs.train[0])]}


def test_rows_of_all_sources_come_back_from_json(make_source, tmp_path):
    splits, problems = prepare(tmp_path, [make_source("train_a", "a", "bb"), make_source("train_b", "ccc")])
    assert not problems
    split = Split.from_json(json.loads(json.dumps(splits["train"].to_json())))
    assert split == splits["train"]
    lengths = {name: rows["length"][:] for name, rows in split.open_datasets().items()}
    assert lengths == {"train_a": [2, 3], "train_b": [4]}


def test_duplicates_are_counted_within_a_split_and_between_splits(make_source, tmp_path):
    train = [make_source("train_a", "a", "b"), make_source("train_b", "a", "c")]
    splits, _ = prepare(tmp_path, train, [make_source("validation", "c", "d")])
    report = splits["train"].report
    assert (report.num_duplicate_rows, report.num_rows_in_validation) == (1, 1)
    assert splits["validation"].report.num_duplicate_rows == 0


def test_problems_of_all_splits_are_told_together_and_bad_rows_listed_anew(make_source, tmp_path):
    (tmp_path / "rejected_rows.jsonl").write_text("of an earlier job")
    sources = [make_source("train", "a", 3)], [make_source("validation", " ")]
    _, problems = prepare(tmp_path, *sources)
    assert [problem.split(" field")[0] for problem in problems] == ["train.jsonl row 2", "validation.jsonl row 1"]
    rejected = [json.loads(line) for line in (tmp_path / "rejected_rows.jsonl").read_text().splitlines()]
    assert [(row["split"], row["row"]) for row in rejected] == [("train", 2), ("validation", 1)]


def test_pairs_come_back_with_their_sequences_and_duplicates_are_whole_pairs(make_source, tmp_path):
    first, second = ({"prompt": "a", "chosen": "b", "rejected": rejected} for rejected in ("c", "d"))
    train, validation = make_source("train", rows=[first, second, first]), make_source("validation", rows=[second])
    splits, problems = prepare(tmp_path, [train], [validation], method="dpo")
    assert problems == []
    (rows,) = Split.from_json(splits["train"].to_json()).open_datasets().values()
    assert rows.column_names == ["input_ids", "labels", "length", "seq_lengths"]
    assert rows["seq_lengths"][:] == [[3, 3]] * 3
    report = splits["train"].report
    assert (report.num_rows, report.lengths, report.num_duplicate_rows, report.num_rows_in_validation) == (
        3,
        {3: 6},
        1,
        1,
    )


def test_a_source_of_another_method_is_told_once(make_source, tmp_path):
    _, problems = prepare(tmp_path, [make_source("train", "a", "b")], method="dpo")
    assert problems == [
        "train.jsonl row 1 is a text row, which method=dpo does not take: set method=sft or distill, or give rows "
        "with 'chosen' with 'rejected'."
    ]


def test_a_shard_without_files_has_the_columns_of_the_other_hosts(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    splits, _ = prepare(tmp_path, [FileSource("train", tmp_path, ())], method="dpo")
    (rows,) = splits["train"].open_datasets().values()
    assert rows.column_names == ["input_ids", "labels", "length", "seq_lengths"]
    assert splits["train"].report.sequences_a_row == 2


def test_packing_is_refused_where_a_row_has_an_image_also_where_its_tokens_were_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    vocabulary = build_vocabulary("qwen", tmp_path)
    save_pictures(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]))
    inputs = SimpleNamespace(train=[FileSource("train", tmp_path, (tmp_path / "rows.jsonl",))], validation=[])
    found = []
    for packing in (None, True):
        data = Settings(packing=packing).data
        found.append(prepare_splits(inputs, vocabulary, data, tmp_path / "rejected_rows.jsonl")[1])
    assert found == [[], ["packing=true: rows have images, and such rows are padded: leave packing out."]]
