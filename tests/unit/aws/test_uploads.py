# SPDX-License-Identifier: Apache-2.0
"""A channel is uploaded once, below the digest of its files, and without what is hidden."""

import io
import os

import pytest
from botocore.awsrequest import AWSResponse

from llm_trainer.aws import clients
from llm_trainer.aws.clients import open_client
from llm_trainer.aws.refusals import explain_refusals
from llm_trainer.aws.uploads import check_region, list_sizes, read_channel, upload_channel
from llm_trainer.common.errors import UserError
from support.aws_server import write_rows
from support.ordinary_user import call_as_user


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


@pytest.mark.parametrize("name", ["gone", "pipe", b"not-utf8-\xff", "x" * 250])
def test_what_s3_cannot_take_is_told(folder, name):
    file = os.fsencode(folder / "/".join(["x" * 250] * 4)) + b"/" if name == "x" * 250 else os.fsencode(folder) + b"/"
    os.makedirs(file, exist_ok=True)
    file += os.fsencode(name)
    if name == "gone":
        os.symlink("nothing", file)
    elif name == "pipe":
        os.mkfifo(file)
    else:
        with open(file, "w"):
            pass
    with pytest.raises(UserError, match=r"is a link to nothing|is no file|is not UTF-8|has 1\d+ bytes with its prefix"):
        read_channel("train", folder, "s3://bucket/input")


def test_strange_names_and_empty_files_arrive_as_they_are(aws, folder):
    aws.furnish()
    names = ["a b+c%20.jsonl", "Größe 日本.jsonl", "empty.jsonl"]
    (folder / "linked.jsonl").symlink_to(folder / "rows.jsonl")
    for name in names:
        (folder / name).write_text("" if name == "empty.jsonl" else name)
    channel = read_channel("train", folder, "s3://bucket/input")
    upload_channel(channel, None)
    there = list_sizes(aws.client("s3"), channel.uri)
    assert there == {name: (folder / name).stat().st_size for name in [*names, "linked.jsonl", "rows.jsonl"]}
    aws.requests.clear()
    upload_channel(channel, None)
    assert aws.list_uploads() == []


@pytest.mark.parametrize("change", [lambda file: file.write_text("{}\n" * 9), lambda file: file.unlink()])
def test_a_file_that_changes_on_its_way_is_never_taken_for_the_one_before(aws, folder, change):
    aws.furnish()
    channel = read_channel("train", folder, "s3://bucket/input")
    content = (folder / "rows.jsonl").read_text()
    change(folder / "rows.jsonl")
    with pytest.raises(UserError, match=r"rows\.jsonl changed while it was uploaded: submit the job again"):
        upload_channel(channel, None)
    assert list_sizes(aws.client("s3"), channel.uri) == {"rows.jsonl": 0}
    (folder / "rows.jsonl").write_text(content)
    again = read_channel("train", folder, "s3://bucket/input")
    upload_channel(again, None)
    assert list_sizes(aws.client("s3"), again.uri) == {"rows.jsonl": len(content)}


def test_a_file_that_this_user_may_not_read(folder):
    (folder / "rows.jsonl").chmod(0)
    with pytest.raises(UserError, match=r"Channel train cannot be read \(.*Permission denied"):
        call_as_user(lambda: read_channel("train", folder, "s3://bucket/input"))


def test_a_bucket_of_another_region_is_told_before_anything_is_sent(aws, folder):
    aws.furnish()
    client = aws.client("s3")
    client.meta.events.register("after-call.s3.ListObjectsV2", tell_region)
    with pytest.raises(UserError, match=r"Bucket bucket is in eu-west-1, and the job in us-west-2: set AWS_DEFAULT"):
        check_region(client, "s3://bucket/input/")


def tell_region(parsed, **_):
    parsed["ResponseMetadata"]["HTTPHeaders"]["x-amz-bucket-region"] = "eu-west-1"


SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


def throttle(times):
    """Have S3 answer so many requests to put an object as it does where too many come."""
    left = [times]

    def answer(request, **_):
        left[0] -= 1
        raw = io.BytesIO(SLOW_DOWN)
        raw.stream = lambda: iter([SLOW_DOWN])
        return AWSResponse(request.url, 503, {}, raw) if left[0] >= 0 else None

    open_client("s3").meta.events.register("before-send.s3.PutObject", answer)


def test_an_upload_outlasts_throttling_and_tells_it_where_it_does_not_end(aws, folder, monkeypatch):
    aws.furnish()
    channel = read_channel("train", folder, "s3://bucket/input")
    throttle(1)
    upload_channel(channel, None)
    assert list_sizes(aws.client("s3"), channel.uri) == {"rows.jsonl": (folder / "rows.jsonl").stat().st_size}
    (folder / "rows.jsonl").write_text("{}\n")
    open_client.cache_clear()
    monkeypatch.setattr(clients, "ATTEMPTS", 1)
    throttle(1)
    told = r"AWS throttles PutObject and went on so .*: try again in a minute"
    with pytest.raises(UserError, match=told), explain_refusals():
        upload_channel(read_channel("train", folder, "s3://bucket/input"), None)
