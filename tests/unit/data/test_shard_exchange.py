# SPDX-License-Identifier: Apache-2.0
"""Three processes that talk over gloo stand for the first ranks of three hosts."""

import json
import socket
from collections import Counter

import pytest
import torch.distributed as dist
import torch.multiprocessing

from llm_trainer.data import shard_exchange
from llm_trainer.data.report import DataReport
from llm_trainer.data.shard_exchange import LocalRankZeroGroup

HOSTS = ("algo-1", "algo-2", "algo-3")
CONTENTS = [b"first" * 1000, b"", b"third" * 7]


@pytest.fixture
def on_each_host(tmp_path, monkeypatch):
    """Runs a function as each of the three hosts; what each returned."""

    def run(function):
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": len(HOSTS)}.items():
            monkeypatch.setenv(name, str(value))
        # Forked, since a fresh process would import torch for seconds.
        torch.multiprocessing.start_processes(begin, (function, tmp_path), nprocs=len(HOSTS), start_method="fork")
        return [json.loads((tmp_path / f"{host}.json").read_text()) for host in HOSTS]

    return run


def begin(number, function, folder):
    shard_exchange.PIECE_BYTES = 1024  # several pieces of the longest file
    with pytest.MonkeyPatch.context() as variables:
        variables.setenv("RANK", str(number))
        dist.init_process_group("gloo")
        result = function(number, LocalRankZeroGroup(HOSTS, folder / HOSTS[number]), folder / HOSTS[number])
        (folder / f"{HOSTS[number]}.json").write_text(json.dumps(result))
        dist.barrier()
        dist.destroy_process_group()


def exchange_files(number, group, folder):
    folder.mkdir()
    (folder / "own").write_bytes(CONTENTS[number])
    files = group.exchange_file(folder / "own", "others")
    assert files[number] == folder / "own"
    return [file.read_text() for file in files]


def test_every_host_has_the_files_of_all_in_the_order_of_the_hosts(on_each_host):
    assert on_each_host(exchange_files) == [[content.decode() for content in CONTENTS]] * 3


def merge(number, group, folder):
    report = DataReport(
        files=[{"sha256": str(number)}], formats={"train": "text"}, num_rows=number, lengths=Counter({4: number})
    )
    if number == 1:
        report.note_bad_row("b.jsonl row 2 has no field 'text'.")
    if number == 2:
        report.formats = {"train": "messages"}
    problems = ["The same everywhere."] + (["A process was killed."] if number == 2 else [])
    merged = group.merge_reports("train", report, problems)
    return merged.num_rows, merged.lengths[4], len(merged.files), merged.bad_rows, group.merge_problems(problems)


def test_every_host_comes_to_the_same_judgement_with_the_names_of_those_it_concerns(on_each_host):
    first, *others = on_each_host(merge)
    assert others == [first, first]
    assert first == [
        3,
        3,
        3,
        ["Host algo-2: b.jsonl row 2 has no field 'text'."],
        [
            "The same everywhere.",
            "'train' has text rows on host algo-1, algo-2 and messages rows on host algo-3: put each format into a "
            "channel of its own, such as train_a and train_b.",
            "Host algo-3: A process was killed.",
        ],
    ]


def find_no_file(number, group, folder):
    problems = []
    group.merge_reports("train", DataReport(), problems)
    return problems


def test_a_shard_may_be_empty_but_not_that_of_every_host(on_each_host):
    sentence = "'train' is sharded, and no host has a data file of it: check its S3 prefix."
    assert on_each_host(find_no_file) == [[sentence]] * 3
