# SPDX-License-Identifier: Apache-2.0
"""Files become rows on disk: counted, judged, kept for the next job, mixed by weight."""

import gzip
import json
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from llm_trainer.common.errors import MAX_FAILURE_CHARACTERS, UserError
from llm_trainer.config.schema import Settings
from llm_trainer.data.datasets import DataPlaces, add_mismatched, draw_others, load_data, mismatch
from llm_trainer.data.encoding import Vocabulary
from llm_trainer.data.formats.examples import IGNORED
from llm_trainer.data.preview import find_data_warnings
from llm_trainer.readers.discovery import find_files
from llm_trainer.readers.sources import FileSource
from support.tiny_model import build_tokenizer

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
)


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads data sets given as {"train" or "validation": {channel: rows, or {file name: bytes}}}."""
    monkeypatch.setenv("LLM_TRAINER_CACHE", str(tmp_path / "cache"))
    scratch = iter(range(100))

    def load(train, validation=None, tokenizer=None, **settings):
        splits = {"train": train} | ({"validation": validation} if validation else {})
        sources = {name: [build_source(tmp_path, *item) for item in split.items()] for name, split in splits.items()}
        inputs = SimpleNamespace(train=sources["train"], validation=sources.get("validation", []))
        environment = SimpleNamespace(output_dir=tmp_path / "output")
        tokenizer = tokenizer or build_tokenizer()
        vocabulary = Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
        scratch_dir = tmp_path / f"scratch-{next(scratch)}"
        scratch_dir.mkdir()
        chosen = Settings(**settings)
        return load_data(DataPlaces(inputs, environment, scratch_dir), vocabulary, chosen.data, chosen.training)

    return load


def build_source(tmp_path, channel, rows):
    files = rows if isinstance(rows, dict) else {"rows.jsonl": "".join(f"{json.dumps(row)}\n" for row in rows).encode()}
    for name, content in files.items():
        file = tmp_path / channel / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return FileSource(channel, tmp_path / channel, tuple(find_files(tmp_path / channel)[0]))


def texts(*words):
    return [{"text": word} for word in words]


def problems_of(load, *splits, **settings):
    with pytest.raises(UserError) as caught:
        load(*splits, **settings)
    return caught.value.problems


def test_rows_are_on_disk_in_their_order_with_a_fingerprint_of_their_files(load):
    data = load({"train": texts("a", "bb", "ccc")})
    assert [len(row["input_ids"]) for row in data.splits["train"]] == data.splits["train"]["length"][:] == [2, 3, 4]
    report = data.reports["train"]
    assert (report.num_rows, report.num_tokens, report.num_supervised_eos) == (3, 9, 3)
    assert report.files[0]["name"] == "rows.jsonl"
    assert len(report.files[0]["sha256"]) == 64
    assert report.length_percentiles() == {"p50": 3, "p90": 4, "p95": 4, "p99": 4, "longest": 4}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_chunks_keep_their_order_however_many_processes_there_are(load, monkeypatch, num_processes):
    monkeypatch.setattr("llm_trainer.data.token_cache.CHUNK_ROWS", 7)
    rows = [{"text": "x" * (number % 50 + 1)} for number in range(200)]
    rows[123] = {"text": 5}
    data = load({"train": rows}, dataset_num_proc=num_processes, max_bad_rows_fraction=0.01)
    assert data.splits["train"]["length"][:] == [number % 50 + 2 for number in range(200) if number != 123]
    assert data.reports["train"].num_bad_rows == 1


def test_the_same_data_is_prepared_once_and_other_settings_prepare_anew(load, tmp_path):
    for settings in ({}, {}, {"learning_rate": 0.5}, {"max_length": 5}):
        load({"train": texts("abc")}, **settings)
    assert len(list((tmp_path / "cache/data").iterdir())) == 2
    load({"train": texts("abd")})
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["ab"])
    data = load({"train": texts("abc")}, tokenizer=tokenizer)
    assert data.splits["train"]["length"][:] == [3]
    assert len(list((tmp_path / "cache/data").iterdir())) == 4


def test_long_rows_are_cut_or_left_out_and_counted(load):
    rows = texts("a" * 50, "b")
    data = load({"train": rows}, max_length=10)
    assert data.splits["train"]["length"][:] == [10, 2]
    report = data.reports["train"]
    assert (report.num_truncated_rows, report.num_dropped_rows, report.longest_row_tokens) == (1, 0, 51)
    data = load({"train": rows}, max_length=10, apply_truncation=False)
    assert data.splits["train"]["length"][:] == [2]
    assert (data.reports["train"].num_truncated_rows, data.reports["train"].num_dropped_rows) == (0, 1)
    assert load({"train": rows}, max_length=None).splits["train"]["length"][:] == [51, 2]
    assert load({"train": rows}, max_length=10, truncation_mode="keep_end").splits["train"][0]["input_ids"][-1] == 2


def test_rows_of_which_the_cut_leaves_nothing_to_train_on_are_left_out_and_counted(load):
    long = {"messages": [{"role": "user", "content": "q" * 60}, {"role": "assistant", "content": "a"}]}
    data = load({"train": [CHAT, long]}, max_length=50)
    assert (data.reports["train"].num_rows, data.reports["train"].num_unsupervised_rows) == (1, 1)


@pytest.mark.parametrize(
    ("num_devices", "batch", "is_full"), [(1, 3, True), (1, 4, False), (3, 1, True), (2, 2, False)]
)
def test_fewer_rows_than_a_batch_of_all_devices_fail_where_such_batches_are_dropped(
    load, monkeypatch, num_devices, batch, is_full
):
    monkeypatch.setenv("WORLD_SIZE", str(num_devices))
    rows, settings = texts("a", "bb", "ccc"), {"per_device_train_batch_size": batch}
    load({"train": rows}, **settings)
    if is_full:
        load({"train": rows}, **settings, dataloader_drop_last=True)
        return
    assert problems_of(load, {"train": rows}, **settings, dataloader_drop_last=True) == (
        "dataloader_drop_last=true drops all training data: 3 rows fill no batch of 4 "
        f"(per_device_train_batch_size={batch} x {num_devices} devices); leave it out, lower "
        "per_device_train_batch_size, or give more rows.",
    )


def test_rows_of_an_epoch_fill_a_batch_by_their_weights(load):
    channels = {"one": texts("a"), "other": texts("b")}
    settings = {"train_weights": {"one": 3.0, "other": 1.0}, "dataloader_drop_last": True}
    assert len(load(channels, **settings, per_device_train_batch_size=4).splits["train"]) == 4
    assert "4 rows fill no batch of 5" in problems_of(load, channels, **settings, per_device_train_batch_size=5)[0]


def test_data_that_would_teach_nothing_or_never_to_stop_fails(load):
    assert "no rows left" in problems_of(load, {"train": texts("a" * 50)}, max_length=10, apply_truncation=False)[0]
    empty = {"a.jsonl": b"", "b.json": b"[]", "c.csv": b"text\n", "d.jsonl.gz": gzip.compress(b"\n")}
    assert problems_of(load, {"empty": empty}) == (
        "The train data has no rows (empty: a.jsonl, b.json, c.csv, d.jsonl.gz): put rows there.",
    )
    assert "No token of the train data" in problems_of(load, {"train": [CHAT]}, max_length=5)[0]
    unlabelled = [{"input_ids": [5, 6, 2], "labels": [IGNORED] * 3}]
    assert "No token of the train data" in problems_of(load, {"train": unlabelled})[0]
    endless = [{"input_ids": [5, 6, 7]}]
    assert "No row of the train data trains the end-of-sequence token" in problems_of(load, {"train": endless})[0]
    masked_eos = [{"input_ids": [5, 6, 2], "labels": [IGNORED, 6, IGNORED]}]
    assert "1 of 1 rows of the train data train on a turn without" in problems_of(load, {"train": masked_eos})[0]
    padded = [{"input_ids": [5, 6, 2, 2], "labels": [IGNORED, 6, 2, IGNORED]}]
    assert load({"train": padded}).reports["train"].num_missed_stops == 0


def test_marks_that_leave_out_the_end_of_a_turn_fail(load):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    (problem,) = problems_of(load, {"train": [CHAT]}, tokenizer=tokenizer)
    assert "without the end-of-sequence token after it" in problem


def test_all_problems_of_all_data_are_told_together(load, tmp_path):
    train = {"a.jsonl": b'{"text": "c"}\n{"text": \n{"text": "\xff"}\n{"text": "a", "text": "b"}\n[1]\n'}
    train["b.json"] = b'[{"text": "c"}, {"text": "d"'
    train["c.jsonl.gz"] = gzip.compress(b'{"text": "c"}\n' * 1000)[:-9]
    problems = problems_of(load, {"train": train}, {"val": texts("ok", " ")})
    expected = [
        "b.json ends in the middle of its JSON array",
        "c.jsonl.gz ends in the middle of its gzip stream",
        "a.jsonl line 2 is not valid JSON (Expecting value at column 10): write one JSON object a line",
        "a.jsonl line 3 is not UTF-8 text",
        "a.jsonl row 4 has the key 'text' twice: keep one of them.",
        "a.jsonl row 5 is a JSON list: write each row as an object",
        "rows.jsonl row 2 field 'text' is white space",
    ]
    assert len(problems) == len(expected)
    for problem, beginning in zip(problems, expected, strict=True):
        assert problem.startswith(beginning)
    rejected = [json.loads(line) for line in (tmp_path / "output/data/rejected_rows.jsonl").open()]
    assert [(row["split"], row["file"], row["row"]) for row in rejected] == [
        *(("train", "a.jsonl", number) for number in (2, 3, 4, 5)),
        ("validation", "rows.jsonl", 2),
    ]
    assert rejected[0]["content"] == '{"text": \n'


def test_rows_of_another_format_are_bad_rows(load):
    (problem,) = problems_of(load, {"train": [*texts("a"), CHAT]})
    assert problem.startswith("rows.jsonl row 2 is a messages row and rows.jsonl row 1 is a text row: put each format")
    data = load({"train_a": texts("a"), "train_b": [CHAT]})
    assert data.reports["train"].formats == {"train_a": "text", "train_b": "messages"}
    assert data.reports["train"].loss_on == {"train_a": "all tokens", "train_b": "assistant turns"}


def test_the_format_is_that_of_the_first_sound_row(load):
    problems = problems_of(load, {"train": [{"question": 1}, CHAT, *texts("a")]})
    assert "row 1 has no field" in problems[0]
    assert "row 3 is a text row and rows.jsonl row 2 is a messages row" in problems[1]


def test_bad_rows_up_to_the_fraction_are_left_out(load, tmp_path):
    rows = [*texts(*"abcdefghi"), {"text": None}]
    data = load({"train": rows}, max_bad_rows_fraction=0.1)
    assert (data.reports["train"].num_rows, data.reports["train"].num_bad_rows) == (9, 1)
    (line,) = (tmp_path / "output/data/rejected_rows.jsonl").read_text().splitlines()
    assert json.loads(line)["reason"].startswith("has no field")
    problems = problems_of(load, {"train": rows}, max_bad_rows_fraction=0.09)
    assert "has 1 bad rows among 10" in problems[-1]
    assert "max_bad_rows_fraction=0.09 allows 0" in problems[-1]


def test_many_bad_rows_are_counted_and_the_failure_stays_short(load):
    problems = problems_of(load, {"train": {"a.jsonl": b"{}\n" * 5000}})
    assert len(problems) == 21
    assert "has 5000 bad rows among 5000" in problems[-1]
    text = str(UserError(*problems))
    assert text.startswith("a.jsonl row 1 has no field")
    assert len(text[:MAX_FAILURE_CHARACTERS].splitlines()[0]) < MAX_FAILURE_CHARACTERS


def test_an_empty_file_among_full_ones_is_no_mistake(load):
    lines = b'{"text": "c"}\n'
    data = load({"train": {"a.jsonl": b"", "b.jsonl": lines, "c.json": b" \n", "d.csv": b"text\nc\n"}})
    assert data.reports["train"].num_rows == 2
    assert len(data.reports["train"].files) == 4
    warnings = list(find_data_warnings("train", data.reports["train"]))
    assert warnings[0] == "the train data has empty files: a.jsonl, c.json."


def test_ten_megabytes_in_one_row_are_cut_like_any_other(load):
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["word " * 100])  # so that it is not as many tokens
    data = load({"train": texts("b", "word " * 2_000_000, "c")}, tokenizer=tokenizer)
    assert data.splits["train"]["length"][:] == [2, 2048, 2]


def test_duplicates_are_counted_within_and_between(load):
    data = load({"train": texts("a", "b", "a", "c")}, {"val": texts("c", "d")})
    assert (data.reports["train"].num_duplicate_rows, data.reports["train"].num_rows_in_validation) == (1, 1)
    assert list(find_data_warnings("train", data.reports["train"])) == [
        "1 rows of the train data are in the validation data too.",
        "1 rows of the train data repeat an earlier one.",
    ]


def test_channels_are_mixed_by_weight_without_losing_a_row(load):
    channels = {"train_a": texts(*"abcdef"), "train_b": texts("longer", "longest")}
    data = load(channels, train_weights={"train_a": 1, "train_b": 1})
    lengths = sorted(data.splits["train"]["length"][:])
    assert lengths == [2] * 6 + [7] * 3 + [8] * 3
    data = load(channels, train_weights={"train_a": 3, "train_b": 2})
    assert len(data.splits["train"]) == 10
    assert sorted(set(data.splits["train"]["length"][:])) == [2, 7, 8]
    assert load(channels).splits["train"]["length"][:] == [2] * 6 + [7, 8]


def test_nothing_half_written_is_taken_for_prepared_data(load, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("llm_trainer.data.tokenize.build_table", fail)
        with pytest.raises(OSError, match="No space left"):
            load({"train": texts("a")})
    assert list((tmp_path / "cache/data").iterdir()) == []
    assert load({"train": texts("a")}).reports["train"].num_rows == 1


def test_a_stream_comes_with_its_audited_rows_and_the_longest_row_it_may_have(load, monkeypatch):
    monkeypatch.setattr("llm_trainer.data.datasets.open_stream", read_heads)
    data = load({"train": texts("a", "bb")}, {"val": texts("ccc")}, streaming=True, max_steps=1, max_length=99)
    assert data.splits["train"] == ({"train"}, 42)
    assert data.sample["length"][:] == [2, 3]
    assert data.splits["validation"]["length"][:] == [4]
    assert data.find_longest_row_tokens(Settings(streaming=True, max_length=99).data) == 99
    assert data.find_longest_row_tokens(Settings(max_length=99).data) == 4


def read_heads(sources, preparers, settings, training_settings, environment):
    """Stand for the stream, which does not end: the names of its sources and the seed."""
    assert [source.name for source in sources] == list(preparers)
    return set(preparers), training_settings.seed


TOKENIZED = [
    {"input_ids": [1, 2, 10], "labels": [IGNORED, IGNORED, 10], "row": 0},
    {"input_ids": [3, 20, 21, 22], "labels": [IGNORED, 20, IGNORED, 22], "row": 1},
    {"input_ids": [4, 5, 6, 30], "labels": [IGNORED, IGNORED, IGNORED, 30], "row": 2},
]


def test_every_prompt_has_another_answer_and_every_answer_comes_once(tmp_path):
    rows = add_mismatched(Dataset.from_list(TOKENIZED), Settings(method="kto").data, tmp_path / "train")
    answers = {row["row"]: (row["input_ids"][-1], row["other_ids"], row["other_labels"]) for row in rows}
    assert sorted(other[-1] for _, other, _ in answers.values()) == [10, 22, 30]
    for number, prompt in enumerate(([1, 2], [3], [4, 5, 6])):
        own, other, labels = answers[number]
        assert other[: len(prompt)] == prompt
        assert other[-1] != own
        assert labels[: len(prompt)] == [IGNORED] * len(prompt)
        assert labels[-1] == other[-1]
    assert rows["input_ids"][:] == [row["input_ids"] for row in TOKENIZED]


def test_the_draw_is_one_round_through_all_rows():
    others = draw_others(50)
    assert sorted(others) == list(range(50))
    assert np.array_equal(others, draw_others(50))
    place, seen = 0, set()
    for _ in range(50):
        seen.add(place := others[place])
    assert len(seen) == 50


@pytest.mark.parametrize(
    ("mode", "expected"), [("keep_start", [4, 5, 6, 20]), ("keep_end", [6, 20, 21, 22])], ids=["start", "end"]
)
def test_it_is_cut_to_max_length(mode, expected):
    row, other = ({name: np.array(values) for name, values in TOKENIZED[place].items()} for place in (2, 1))
    ids, labels = mismatch(row, other, Settings(method="kto", max_length=4, truncation_mode=mode).data)
    assert ids.tolist() == expected
    assert len(labels) == 4
