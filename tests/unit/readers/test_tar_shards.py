# SPDX-License-Identifier: Apache-2.0
"""A tar shard gives the rows that it was written from."""

import gzip
import io
import json
import tarfile

import pytest

from llm_trainer.readers import tar_shards
from llm_trainer.readers.files import read_chunks
from llm_trainer.readers.images import ImageRef
from llm_trainer.readers.rows import TOO_LONG, BadRow, DamagedFile
from support.data_files import compress_zstd


def write_shard(file, members):
    with tarfile.open(file, "w") as shard:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            shard.addfile(entry, io.BytesIO(data))
    return file


def read(file):
    return [row for chunk in read_chunks(file, file.name, 100) for row in chunk.rows]


def open_part(part):
    return ImageRef(str(part.path), part.offset, part.size).open().read()


def test_members_of_one_key_are_a_row(tmp_path):
    members = [
        ("a/1.jpg", b"first"),
        ("a/1.json", json.dumps({"messages": []}).encode()),
        ("a/2.left.png", b"left"),
        ("a/2.right.PNG", b"right"),
        ("a/2.txt", "Zwölf".encode()),
        ("a/3.txt", b"alone"),
        ("b/3.cls", b"7"),
        ("b/3.mp4", b"film"),
        (".hidden", b""),
        ("nothing", b""),
    ]
    rows = read(write_shard(tmp_path / "a.tar", members))
    images = [[open_part(part) for part in row.pop("images", [])] for row in rows]
    assert images == [[b"first"], [b"left", b"right"], [], []]
    assert rows == [{"messages": []}, {"text": "Zwölf"}, {"text": "alone"}, {".mp4": "4 bytes"}]


def test_members_of_a_key_may_stand_apart(tmp_path):
    members = [
        *(("a/1.png", b"1"), ("b/1.png", b"2"), ("./a/2.jpg", b"3"), ("Bild 3.JPEG", b"4")),
        *(("a/2.json", b'{"n": 2}'), ("b/1.json", b'{"n": 3}'), ("a/1.json", b'{"n": 1}'), ("Bild 3.txt", b"<image>")),
    ]
    rows = read(write_shard(tmp_path / "a.tar", members))
    images = [[(part.name, open_part(part)) for part in row.pop("images")] for row in rows]
    assert images == [
        *([("a.tar:a/1.png", b"1")], [("a.tar:b/1.png", b"2")], [("a.tar:./a/2.jpg", b"3")]),
        [("a.tar:Bild 3.JPEG", b"4")],
    ]
    assert rows == [{"n": 1}, {"n": 3}, {"n": 2}, {"text": "<image>"}]


def test_a_member_without_its_partner_makes_a_bad_row(tmp_path):
    members = [
        *(("a/1.png", b"1"), ("a/2.png", b"2"), ("a/2.json", b"{}"), ("a/3.json", b'{"text": "<image> red"}')),
        *(("a/4.json", b'{"text": "red"}'), ("a/5.json", b'{"text": "<image>", "images": ["5.png"]}')),
    ]
    rows = read(write_shard(tmp_path / "a.tar", members))
    assert rows[0] == BadRow("has the image a/1.png and no member .json or .txt beside it")
    assert rows[2] == BadRow("has the text <image> in a/3.json and no image beside it")
    assert not any(isinstance(rows[place], BadRow) for place in (1, 3, 4))


def test_a_shard_of_texts_alone_may_speak_of_placeholders(tmp_path):
    rows = read(write_shard(tmp_path / "a.tar", [("1.txt", b"Write <image>.")]))
    assert rows == [{"text": "Write <image>."}]


def test_a_member_of_another_kind_is_no_field_that_a_format_reads(tmp_path):
    rows = read(write_shard(tmp_path / "a.tar", [("1.text", b"a"), ("2.prompt", b"b"), ("2.completion", b"c")]))
    assert rows == [{".text": "1 bytes"}, {".prompt": "1 bytes", ".completion": "1 bytes"}]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_link_or_a_file_with_holes_makes_a_bad_row(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for name, data in (("1.txt", b"text"), ("1.png", b"image"), ("2.txt", b"alone")):
            entry = tarfile.TarInfo(name)
            entry.type = kind if data == b"image" else tarfile.REGTYPE
            entry.linkname, entry.size = ("0.png", 0) if data == b"image" else ("", len(data))
            shard.addfile(entry, io.BytesIO(data))
    bad, good = read(tmp_path / "a.tar")
    assert "has the member 1.png, a link or a file with holes" in bad.reason and good == {"text": "alone"}


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ([("v1.0_a.json", b'{"n": 1}'), ("v1.0_b.json", b'{"n": 2}')], "n"),
        ([("1.json", b'{"text": "a"}'), ("1.txt", b"b")], "text"),
    ],
)
def test_two_members_with_one_field_make_a_bad_row(tmp_path, members, field):
    (row,) = read(write_shard(tmp_path / "a.tar", members))
    assert f"cannot be read (another member has the field '{field}', too)" in row.reason


@pytest.mark.parametrize(
    ("names", "row"),
    [
        ({"images": ["x/1.png"]}, {}),
        ({"image": "1.png"}, {}),
        ({"image": None, "n": 1}, {"image": None, "n": 1}),
        ({"images": ["1.png", "2.png"]}, BadRow("names 2 images and has 1 beside its text")),
    ],
)
def test_the_images_of_a_key_take_the_place_of_their_names(tmp_path, names, row):
    (read_row,) = read(write_shard(tmp_path / "a.tar", [("1.json", json.dumps(names).encode()), ("1.png", b"image")]))
    if isinstance(row, dict):
        assert [open_part(part) for part in read_row.pop("images")] == [b"image"]
        row = {name: value for name, value in row.items() if name != "image"}
    assert read_row == row


def test_texts_of_members_count_as_those_of_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_shards, "MAX_ROW_BYTES", 20)
    members = [("1.json", b'{"a": ["' + b"x" * 20 + b'"]}'), ("2.json", b"{}"), ("3.json", b'{"a": ["xxxx"]}')]
    file = write_shard(tmp_path / "a.tar", [*members, ("2.png", bytes(100))])
    lengths = [(row, length) for _, row, length in tar_shards.read_tar(file, "a.tar")]
    assert lengths[0][0] == BadRow(TOO_LONG) and lengths[2] == ({"a": ["xxxx"]}, 15)
    assert [length for _, length in lengths] == [31, 2, 15]


def test_two_members_of_one_name_make_a_bad_row(tmp_path):
    rows = read(write_shard(tmp_path / "a.tar", [("1.txt", b"a"), ("2.txt", b"b"), ("1.txt", b"c")]))
    assert rows == [BadRow("has two members 1.txt"), {"text": "b"}]


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"a": 1, "a": 2}'])
def test_a_text_that_cannot_be_read_makes_a_bad_row_alone(tmp_path, content):
    rows = read(write_shard(tmp_path / "a.tar", [("1.json", content), ("2.txt", b"good")]))
    assert isinstance(rows[0], BadRow) and "1.json" in rows[0].reason
    assert rows[1] == {"text": "good"}


def test_a_shard_that_is_cut_off_is_told_after_its_rows(tmp_path):
    file = write_shard(tmp_path / "a.tar", [(f"{number}.txt", bytes(2000)) for number in range(9)])
    file.write_bytes(file.read_bytes()[:8000])
    rows = []
    with pytest.raises(DamagedFile, match=r"a\.tar is damaged after row 3"):
        rows.extend(row for chunk in read_chunks(file, file.name, 1) for row in chunk.rows)
    assert len(rows) == 3


def test_a_shard_behind_another_is_told_after_the_rows_of_the_first(tmp_path):
    file = write_shard(tmp_path / "a.tar", [("1.txt", b"a")])
    file.write_bytes(file.read_bytes() * 2)
    with pytest.raises(DamagedFile, match=r"a\.tar is damaged after row 1 \(more behind the mark of its end\)"):
        read(file)


@pytest.mark.parametrize(
    ("size", "kind"),
    [(-512, b"0"), (-1024, b"S"), (2**62, b"x"), (2**62, b"L"), (-512, b"x")],
)
def test_a_header_made_to_harm_is_told_after_the_rows_before_it(tmp_path, size, kind):
    entry = tarfile.TarInfo("2.txt")
    entry.type, entry.size = kind, size
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as shard:
        first = tarfile.TarInfo("1.txt")
        first.size = 1
        shard.addfile(first, io.BytesIO(b"a"))
        header = entry.tobuf(tarfile.GNU_FORMAT)
        shard.fileobj.write(header)
    with pytest.raises(DamagedFile, match=r"a\.tar is damaged (after row 1|before its first row)"):
        read(tmp_path / "a.tar")


@pytest.mark.parametrize(("compress", "codec"), [(gzip.compress, "gzip"), (compress_zstd, "zstd")])
def test_a_shard_that_is_compressed_is_told(tmp_path, compress, codec):
    file = write_shard(tmp_path / "a.tar", [("1.txt", b"a")])
    file.write_bytes(compress(file.read_bytes()))
    with pytest.raises(DamagedFile, match=rf"a\.tar is compressed by {codec}, and a shard is read in place: unpack it"):
        read(file)


def test_what_is_no_tar_file_is_told(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"text" * 1000)
    with pytest.raises(DamagedFile, match=r"a\.tar is damaged before its first row"):
        read(tmp_path / "a.tar")
