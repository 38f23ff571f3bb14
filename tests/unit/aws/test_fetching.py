# SPDX-License-Identifier: Apache-2.0
"""Results come whole, once, and never outside of their folder."""

import io
import os
import tarfile

import pytest

from llm_trainer.aws.fetching import fetch_results
from llm_trainer.common.errors import UserError

JOB = {
    "TrainingJobName": "job-1",
    "TrainingJobStatus": "Completed",
    "OutputDataConfig": {"S3OutputPath": "s3://bucket/output/"},
}
PLACE = "s3://bucket/output/job-1/output"


def pack(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path, aws):
    aws.furnish()
    return tmp_path / "job-1"


def test_a_prefix_is_fetched_once(aws, folder):
    aws.put_files(PLACE, {"model/adapter.safetensors": b"weights", "data/report.html": "<html>"})
    aws.put_files("s3://bucket/output/job-10/output", {"model/other": b"x"})
    assert fetch_results(JOB, folder) == [folder / "data/report.html"]
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()) == [
        "data/report.html",
        "model/adapter.safetensors",
    ]
    assert (folder / "model/adapter.safetensors").read_bytes() == b"weights"
    (folder / "model/adapter.safetensors").unlink()
    aws.requests.clear()
    fetch_results(JOB, folder)
    assert [asked.path for asked in aws.requests if asked.method == "GET" and "list-type" not in asked.path] == [
        "/bucket/output/job-1/output/model/adapter.safetensors"
    ]


def test_nothing_that_is_another_jobs_or_the_users_is_kept_or_overwritten(aws, folder):
    aws.put_files(PLACE, {"adapter.safetensors": b"weights", "report.html": b"<html>"})
    fetch_results(JOB, folder)
    aws.put_files("s3://bucket/output/job-2/output", {"adapter.safetensors": b"WEIGHTS", "data/report.html": b"<html>"})
    os.utime(folder / "adapter.safetensors", (0, 0))  # as the other job's would have another time
    with pytest.raises(UserError, match=r"adapter\.safetensors is there, and is not the job's: remove it, or name"):
        fetch_results({**JOB, "TrainingJobName": "job-2"}, folder)
    assert (folder / "adapter.safetensors").read_bytes() == b"weights" and not (folder / "data").exists()
    (folder / "adapter.safetensors").unlink()
    (folder / "adapter.safetensors").symlink_to("nothing")
    with pytest.raises(UserError, match="is there, and is not the job's"):
        fetch_results(JOB, folder)


def test_a_disk_that_is_too_small_or_closed_is_told_before_anything_comes(aws, folder, monkeypatch):
    aws.put_files(PLACE, {"model/adapter.safetensors": b"weights"})
    monkeypatch.setattr("llm_trainer.aws.fetching.find_free_bytes", lambda folder: 6)
    with pytest.raises(UserError, match=r"The results have .*, and .* are free in"):
        fetch_results(JOB, folder)
    assert not list(folder.iterdir())
    (folder.parent / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        fetch_results(JOB, folder.parent / "file")


def test_archives_are_unpacked(aws, folder):
    archives = {
        "model.tar.gz": pack(config=b"{}"),
        "output.tar.gz": pack(data__report=b"", **{"report.html": b"<html>"}),
    }
    aws.put_files(PLACE, archives)
    assert fetch_results(JOB, folder) == [folder / "output/report.html"]
    assert (folder / "model/config").read_bytes() == b"{}"
    assert fetch_results(JOB, folder) == [folder / "output/report.html"]


def link(target, kind):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo("link")
        member.type, member.linkname = kind, target
        tar.addfile(member)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pack(**{"..__..__out": b"x"}),
        pack(**{"__out": b"x", "config/../..__out": b"x"}),
        link("../../out", tarfile.SYMTYPE),
        link("/etc/passwd", tarfile.LNKTYPE),
        link("", tarfile.CHRTYPE),
        pack(config=b"{}")[:-9],
    ],
    ids=["out", "absolute", "link", "hard link", "device", "cut"],
)
def test_an_archive_that_leads_out_or_is_cut_leaves_nothing(aws, folder, content):
    aws.put_files(PLACE, {"model.tar.gz": content})
    with pytest.raises(UserError, match=r"model\.tar\.gz is (refused|no whole tar archive)"):
        fetch_results(JOB, folder)
    assert [file.name for file in folder.iterdir()] == ["model.tar.gz"]
    assert [file.name for file in folder.parent.iterdir()] == ["job-1"]


def test_an_object_that_leads_out(aws, folder):
    aws.put_files(PLACE, {"../../up": b"x"})
    with pytest.raises(UserError, match="leads out of"):
        fetch_results(JOB, folder)
    assert not folder.exists() or not list(folder.iterdir())


def test_a_job_that_has_left_nothing(aws, folder):
    with pytest.raises(UserError, match="holds nothing: the job is Completed"):
        fetch_results(JOB, folder)
