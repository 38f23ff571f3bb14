# SPDX-License-Identifier: Apache-2.0
"""Rows read while training: who gets which of them, in which order, and what happens to bad ones."""

import dataclasses
import itertools
import json
from collections import Counter

import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from llm_trainer.common.errors import UserError
from llm_trainer.config.checks import find_contradictions
from llm_trainer.config.environment import read_environment
from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import Vocabulary
from llm_trainer.data.streaming import AUDITED_ROWS, SourceHead, build_preparers, open_stream
from llm_trainer.job.failure_reasons import explain
from llm_trainer.readers.sources import FileSource
from support.tiny_model import build_tokenizer

TOKENIZER = build_tokenizer()
VOCABULARY = Vocabulary(TOKENIZER, frozenset({TOKENIZER.eos_token_id}), len(TOKENIZER))


@pytest.fixture
def environment(tmp_path, monkeypatch):
    monkeypatch.setenv("SAGEMAKER_BASE_DIR", str(tmp_path))
    return read_environment()


@pytest.fixture
def make_source(tmp_path):
    """A source of rows whose texts are numbers, or of the lines that are given."""

    def make(name, numbers=(), lines=(), is_sharded=False):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(f"{line}\n" for line in [*(json.dumps({"text": str(n)}) for n in numbers), *lines]))
        return FileSource(name, tmp_path, (file,), is_sharded=is_sharded)

    return make


@pytest.fixture
def read(environment, monkeypatch):
    """Reads so many rows as a place of so many gets them; the numbers that they hold."""

    def read_rows(sources, count, place=0, places=1, hosts=("localhost",), **settings):
        monkeypatch.setenv("WORLD_SIZE", str(places))
        chosen = Settings(streaming=True, max_steps=1, **settings)
        preparers = build_preparers(VOCABULARY, chosen.data, {source.name: "text" for source in sources})
        here = dataclasses.replace(environment, hosts=hosts, current_host=hosts[0])
        stream = open_stream(sources, preparers, chosen.data, chosen.training, here)
        loader = prepare_data_loader(
            DataLoader(stream, batch_size=10, num_workers=chosen.training.dataloader_num_workers, collate_fn=list),
            num_processes=places,
            process_index=place,
            dispatch_batches=False,
        )
        rows = itertools.islice(itertools.chain.from_iterable(loader), count)
        return [int(TOKENIZER.decode(row["input_ids"], skip_special_tokens=True)) for row in rows]

    return read_rows


def test_all_places_together_get_each_row_once_a_pass(make_source, read):
    source = make_source("train", range(250))  # chunks of 100, 100 and 50 rows
    first = read([source], 250, place=0, places=2)
    second = read([source], 250, place=1, places=2)
    assert sorted(first[:150] + second[:100]) == list(range(250))
    assert sorted(first[150:] + second[100:]) == list(range(250))  # the other way round: all have all after two passes


def test_processes_of_a_dataloader_share_the_rows_of_their_rank(make_source, read):
    source = make_source("train", range(400))
    ranks = [read([source], 200, place=rank, places=2, dataloader_num_workers=2) for rank in range(2)]
    assert sorted(ranks[0] + ranks[1]) == list(range(400))


def test_each_pass_has_an_order_of_its_own_and_each_run_the_same(make_source, read):
    source = make_source("train", range(90))
    rows = read([source], 180)
    assert sorted(rows[:90]) == sorted(rows[90:]) == list(range(90))
    assert len({tuple(rows[:90]), tuple(rows[90:]), tuple(range(90))}) == 3
    assert read([source], 180) == rows
    assert read([source], 180, seed=43) != rows


def test_a_place_without_a_chunk_waits_for_the_next_pass(make_source, read):
    source = make_source("train", range(5))
    assert sorted(read([source], 5, place=1, places=2)) == list(range(5))


@pytest.mark.parametrize(("weights", "share"), [(None, 0.5), ({"train_a": 1, "train_b": 3}, 0.25)])
def test_sources_are_mixed_by_their_weights(make_source, read, weights, share):
    sources = [make_source("train_a", range(20)), make_source("train_b", range(1000, 1800))]
    counts = Counter(number < 1000 for number in read(sources, 1000, train_weights=weights))
    assert counts[True] == pytest.approx(1000 * share, abs=60)


def test_ranks_of_a_host_share_its_shard_alone(make_source, read):
    source = make_source("train", range(200), is_sharded=True)
    hosts = ("algo-1", "algo-2")
    ranks = [read([source], 100, place=rank, places=4, hosts=hosts) for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == list(range(200))


def test_a_shard_without_a_row_to_train_on_is_told_with_its_host(make_source, read):
    source = make_source("train", is_sharded=True)
    for shard in (source, dataclasses.replace(source, files=())):
        with pytest.raises(UserError, match="'train' has no row to train on in the shard of host algo-1"):
            read([shard], 1, places=2, hosts=("algo-1", "algo-2"))


def test_a_bad_row_ends_the_stream_or_is_listed_where_some_are_allowed(make_source, read, environment):
    source = make_source("train", range(AUDITED_ROWS), lines=['{"txet": "a"}', *['{"text": "7"}'] * 99])
    with pytest.raises(UserError, match=r"train.jsonl row 1001 has no field"):
        read([source], AUDITED_ROWS + 1)
    assert len(read([source], AUDITED_ROWS + 99, max_bad_rows_fraction=0.01)) == AUDITED_ROWS + 99
    *_, last = (environment.output_dir / "data/rejected_rows.jsonl").read_text().splitlines()
    assert json.loads(last)["content"].strip() == '{"txet": "a"}'


def test_a_process_of_a_dataloader_tells_the_bad_row_as_a_rank_does(make_source, read):
    source = make_source("train", lines=['{"txet": "a"}'])
    with pytest.raises(UserError) as raised:
        read([source], 1, dataloader_num_workers=1)
    failure = explain(raised.value, "Rank 0", None)
    assert failure.kind == "mistake"
    assert failure.reason.startswith("train.jsonl row 1 has no field")


def test_a_damaged_file_ends_the_stream_with_its_name(make_source, read, tmp_path):
    source = make_source("train", range(10))
    broken = tmp_path / "worse.jsonl.gz"
    broken.write_bytes(b"\x1f\x8b" + bytes(100))
    with pytest.raises(UserError, match=r"worse\.jsonl\.gz is damaged"):
        read([FileSource("train", tmp_path, (*source.files, broken))], 20)


def test_the_audit_reads_the_first_rows_and_no_digest_of_the_files(make_source):
    head = SourceHead(make_source("train", range(3 * AUDITED_ROWS)))
    (chunks,) = head.read_parts(500)
    assert sum(len(chunk.rows) for chunk in chunks) == AUDITED_ROWS
    (file,) = head.identify_files()
    assert file["name"] == "train.jsonl"
    assert "sha256" not in file


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({}, "streaming=true needs max_steps"),
        ({"max_steps": 5, "packing": True}, "packing=true with streaming=true"),
        (
            {"max_steps": 5, "train_sampling_strategy": "group_by_length"},
            "train_sampling_strategy=group_by_length with",
        ),
        ({"max_steps": 5, "shuffle_dataset": True}, "shuffle_dataset=true with streaming=true"),
    ],
)
def test_what_needs_all_rows_is_refused_with_streaming(settings, sentence):
    (problem,) = find_contradictions(Settings(streaming=True, **settings))
    assert problem.startswith(sentence)
