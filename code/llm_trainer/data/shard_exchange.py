# SPDX-License-Identifier: Apache-2.0
"""Exchange of shards: every host gets the rows that each host prepared from its own files, in the hosts' order.

The hosts share the work of tokenizing. The training then is the same as on data that every host has, and no rank runs
out of rows before another.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llm_trainer.common.ranks import local_world_size, rank, world_size
from llm_trainer.data.report import DataReport

T = TypeVar("T")
PIECE_BYTES = 1 << 26
# A host may tokenize for hours longer than another. The launchers notice a lost host and end the job.
PATIENCE = timedelta(days=1)


class LocalRankZeroGroup:
    """The first ranks of all hosts, which exchange the rows that their hosts prepared."""

    def __init__(self, hosts: tuple[str, ...], folder: Path) -> None:
        """Open the group, which every rank of the job must do; files of other hosts go into the folder."""
        self.hosts = hosts
        self.folder = folder
        self.ranks = list(range(0, world_size(), local_world_size()))
        self.group = dist.new_group(self.ranks, timeout=PATIENCE, backend="gloo")

    def gather_objects(self, own: T) -> list[T]:
        """Return each host's object, in the order of the hosts."""
        objects: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(objects, own, group=self.group)
        return objects

    def merge_problems(self, own: list[str]) -> list[str]:
        """Return the problems of all hosts; a problem that not all have begins with the name of its host."""
        lists = self.gather_objects(own)
        shared = [problem for problem in own if all(problem in problems for problems in lists)]
        return shared + [
            f"Host {host}: {problem}"
            for host, problems in zip(self.hosts, lists, strict=True)
            for problem in problems
            if problem not in shared
        ]

    def merge_reports(self, source: str, own: DataReport | None, problems: list[str]) -> DataReport:
        """Return the counts of a source's shards together; `own` is None where this host could not prepare its shard.

        Adds a sentence to the problems for each thing that is wrong with the shards as a whole.
        """
        reports = self.gather_objects(own)
        merged = DataReport()
        formats: dict[str, list[str]] = {}
        for host, report in zip(self.hosts, reports, strict=True):
            if report is not None:
                report.bad_rows = [f"Host {host}: {problem}" for problem in report.bad_rows]
                report.damage = [f"Host {host}: {problem}" for problem in report.damage]
                merged.add_report(report)
                for row_format in report.formats.values():
                    formats.setdefault(row_format, []).append(host)
        if not merged.files and None not in reports:
            problems.append(f"{source!r} is sharded, and no host has a data file of it: check its S3 prefix.")
        if len(formats) > 1:
            found = " and ".join(f"{name} rows on host {', '.join(hosts)}" for name, hosts in formats.items())
            fix = "put each format into a channel of its own, such as train_a and train_b."
            problems.append(f"{source!r} has {found}: {fix}")
        return merged

    def exchange_file(self, own: Path, name: str) -> list[Path]:
        """Return each host's file: this host's own one where it is, the others' copied to a folder of that name."""
        files = []
        for host, sender in zip(self.hosts, self.ranks, strict=True):
            target = None if sender == rank() else self.folder / name / host
            send_file(own, target, sender, self.group)
            files.append(target or own)
        return files


def send_file(source: Path, target: Path | None, sender: int, group: dist.ProcessGroup) -> None:
    """Broadcast a file of the sending rank in pieces; a rank with a target writes it there."""
    size = [source.stat().st_size if rank() == sender else 0]
    dist.broadcast_object_list(size, src=sender, group=group)
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"")
    for start in range(0, size[0], PIECE_BYTES):
        piece = torch.empty(min(PIECE_BYTES, size[0] - start), dtype=torch.uint8)
        if rank() == sender:
            with source.open("rb") as stream:
                stream.seek(start)
                piece = torch.frombuffer(bytearray(stream.read(len(piece))), dtype=torch.uint8)
        dist.broadcast(piece, src=sender, group=group)
        if target:
            with target.open("ab") as stream:
                stream.write(piece.numpy().tobytes())
