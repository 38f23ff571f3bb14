# SPDX-License-Identifier: Apache-2.0
"""What each host prepared of its own shard -> the rows of all hosts on every host, in the order of the hosts.

Tokenizing is shared out, and the training that follows is the one on data that every host has: no rank can run out of
rows before another.
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
# A host may tokenize for hours longer than another. One that is lost is noticed by the launchers, which end the job.
PATIENCE = timedelta(days=1)


class Leaders:
    """The first rank of each host, which exchange what their hosts prepared. Every rank must make one."""

    def __init__(self, hosts: tuple[str, ...], folder: Path) -> None:
        self.hosts = hosts
        self.folder = folder  # for what the other hosts send
        self.ranks = list(range(0, world_size(), local_world_size()))
        self.group = dist.new_group(self.ranks, timeout=PATIENCE, backend="gloo")

    def gather(self, own: T) -> list[T]:
        """Each host's object."""
        objects: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(objects, own, group=self.group)
        return objects

    def merge_problems(self, own: list[str]) -> list[str]:
        """The problems of all hosts; one that not all have, with the name of the host."""
        lists = self.gather(own)
        shared = [problem for problem in own if all(problem in problems for problems in lists)]
        return shared + [
            f"Host {host}: {problem}"
            for host, problems in zip(self.hosts, lists, strict=True)
            for problem in problems
            if problem not in shared
        ]

    def merge_reports(self, source: str, own: DataReport | None, problems: list[str]) -> DataReport:
        """The counts of a source's shards together; `own` is None where there were problems with this host's.

        Adds a sentence to the problems for what is wrong with the shards as a whole.
        """
        reports = self.gather(own)
        merged = DataReport()
        formats: dict[str, list[str]] = {}
        for host, report in zip(self.hosts, reports, strict=True):
            if report is not None:
                report.bad_rows = [f"Host {host}: {problem}" for problem in report.bad_rows]
                report.damage = [f"Host {host}: {problem}" for problem in report.damage]
                merged.add(report)
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
        """Each host's file: this host's own one where it is, the others' copied to a folder of that name."""
        files = []
        for host, sender in zip(self.hosts, self.ranks, strict=True):
            target = None if sender == rank() else self.folder / name / host
            send_file(own, target, sender, self.group)
            files.append(target or own)
        return files


def send_file(source: Path, target: Path | None, sender: int, group: dist.ProcessGroup) -> None:
    """Broadcast a file of the sender's in pieces; a rank with a target writes it there."""
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
