# SPDX-License-Identifier: Apache-2.0
"""Hosts and jobs that share a disk share the tokens on it."""

import json
from threading import Barrier

import pytest
import torch.multiprocessing
from datasets import Dataset

from llm_trainer.config.schema import Settings
from llm_trainer.data.encoding import Vocabulary
from llm_trainer.data.token_cache import ROWS, prepare_source
from llm_trainer.readers.sources import FileSource
from support.tiny_model import build_tokenizer
from support.waiting import GUARD_SECONDS

NUM_ROWS = 2000


def prepare_at_once(rank, folder, barrier: Barrier):
    """Prepare the folder's rows.jsonl. Nobody reads a row before all have begun, nor ends before all have read."""

    class SlowSource(FileSource):
        def read_parts(self, max_rows):
            barrier.wait()
            yield from super().read_parts(max_rows)
            barrier.wait()

    tokenizer = build_tokenizer()
    vocabulary = Vocabulary(tokenizer, frozenset({tokenizer.eos_token_id}), len(tokenizer))
    source = SlowSource("train", folder, (folder / "rows.jsonl",))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LLM_TRAINER_CACHE", str(folder / "cache"))
        prepared, report = prepare_source(source, vocabulary, Settings(dataset_num_proc=1).data)
    assert report.num_rows == NUM_ROWS
    assert Dataset.from_file(str(prepared / ROWS))["length"][:] == [number % 50 + 2 for number in range(NUM_ROWS)]


def test_two_processes_prepare_the_same_data_at_once_and_one_folder_is_left(tmp_path):
    rows = [{"text": "x" * (number % 50 + 1)} for number in range(NUM_ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    barrier = torch.multiprocessing.get_context("spawn").Barrier(2, timeout=GUARD_SECONDS)
    torch.multiprocessing.spawn(prepare_at_once, (tmp_path, barrier), nprocs=2)
    assert len(list((tmp_path / "cache/data").iterdir())) == 1
