# SPDX-License-Identifier: Apache-2.0
"""A channel is uploaded once, below the digest of its files, and without what is hidden."""

import pytest

from llm_trainer.aws.uploads import read_channel, upload_channel
from llm_trainer.common.errors import UserError
from support.aws_server import write_rows


@pytest.fixture
def folder(tmp_path):
    return write_rows(tmp_path / "train")


def test_what_is_there_is_not_uploaded_again(aws, folder):
    aws.furnish()
    (folder / "more").mkdir()
    (folder / "more/rows.jsonl").write_text("{}\n")
    channel = read_channel("train", folder, "s3://bucket/input/")
    upload_channel(channel, None)
    place = channel.uri.removeprefix("s3:/")
    assert sorted(aws.list_uploads()) == [f"{place}more/rows.jsonl", f"{place}rows.jsonl"]
    upload_channel(read_channel("train", folder, "s3://bucket/input"), None)
    assert len(aws.list_uploads()) == 2


def test_an_upload_that_was_cut_off_goes_on(aws, folder):
    aws.furnish()
    (folder / "b.jsonl").write_text("{}\n")
    channel = read_channel("train", folder, "s3://bucket/input")
    aws.put_files(channel.uri, {"b.jsonl": "{}\n", "rows.jsonl": "cut"})
    aws.requests.clear()
    upload_channel(channel, None)
    assert aws.list_uploads() == [channel.uri.removeprefix("s3:/") + "rows.jsonl"]


def test_changed_data_get_another_place(folder):
    before = read_channel("train", folder, "s3://bucket/input").uri
    (folder / "rows.jsonl").write_text("{}\n")
    after = read_channel("train", folder, "s3://bucket/input").uri
    assert before != after
    (folder / "rows.jsonl").rename(folder / "other.jsonl")
    assert read_channel("train", folder, "s3://bucket/input").uri != after


def test_a_key_encrypts_the_upload(aws, folder):
    aws.furnish()
    channel = read_channel("train", folder / "rows.jsonl", "s3://bucket/input")
    upload_channel(channel, "key-1")
    head = aws.client("s3").head_object(Bucket="bucket", Key=f"{channel.uri.removeprefix('s3://bucket/')}rows.jsonl")
    assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", "key-1")


def test_a_folder_that_holds_nothing_or_a_link(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no file"):
        read_channel("train", tmp_path / "empty", "s3://bucket/input")
    (folder / "linked").symlink_to(tmp_path / "empty")
    with pytest.raises(UserError, match="linked is a link to a folder"):
        read_channel("train", folder, "s3://bucket/input")
