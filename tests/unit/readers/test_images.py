# SPDX-License-Identifier: Apache-2.0
"""Images open within bounds, whatever a row names and whatever a file holds."""

import base64
import errno
import io
import os
import random
import re
import struct
import zlib
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image, ImageOps

from llm_trainer.readers import images
from llm_trainer.readers.addresses import FetchError
from llm_trainer.readers.images import (
    FORMATS,
    ImageError,
    ImageFolder,
    ImagePlace,
    ImageRef,
    ImageRules,
    decode_uri,
    encode_uri,
    find_image,
    inspect_image,
    open_image,
)
from llm_trainer.readers.rows import FilePart
from support.tiny_processors import draw

RULES = ImageRules(1_000_000)
RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def encode(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def open_bytes(data, rules=RULES):
    """The image, after the look at it that rows are checked by."""
    ref = ImageRef(data=data)
    size = inspect_image(ref, rules)
    image = open_image(ref, rules)
    assert (image.height, image.width) == size and image.mode == "RGB"
    return image


def find_reason(data, rules=RULES):
    """Why an image is refused: for the same reason when it is looked at, and when it is opened."""
    reasons = set()
    for look in (inspect_image, open_image):
        with pytest.raises(ImageError) as error:
            look(ImageRef(data=data), rules)
        reasons.add(str(error.value))
    (reason,) = reasons
    return reason


@pytest.fixture
def place(tmp_path):
    channel = tmp_path / "train"
    (channel / "deep").mkdir(parents=True)
    draw(4, 4).save(channel / "a.png")
    draw(4, 4).save(tmp_path / "outside.png")
    (channel / "rows.jsonl").touch()
    return ImagePlace(channel / "rows.jsonl", ImageFolder(channel))


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_that_is_read_opens(kind):
    assert open_bytes(encode(draw(9, 5), kind)).size == (9, 5)


CORNERS = [RED, BLUE, WHITE, (0, 0, 0)]


def draw_corners():
    """An image with a colour of its own in each quarter."""
    image = Image.new("RGB", (64, 32))
    for colour, place in zip(CORNERS, [(0, 0), (32, 0), (0, 16), (32, 16)], strict=True):
        image.paste(colour, (*place, place[0] + 32, place[1] + 16))
    return image


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "TIFF", "WEBP"])
def test_an_image_stands_upright_as_pillow_turns_it(kind, turn):
    exif = Image.Exif()
    exif[images.ORIENTATION] = turn
    data = encode(draw_corners(), kind, exif=exif)
    opened, expected = open_bytes(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert opened.size == expected.size == ((32, 64) if turn > 4 else (64, 32))
    assert np.array_equal(np.asarray(opened), np.asarray(expected.convert("RGB")))


@pytest.mark.parametrize("exif", [b"II*\0", b"XX", b"MM\0*\0\0\0\x08\xff\xff", b""])
@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_exif_data_that_cannot_be_read_turn_nothing(kind, exif):
    assert open_bytes(encode(draw(8, 4), kind, exif=b"Exif\0\0" + exif)).size == (8, 4)


def test_of_several_images_in_a_jpeg_the_first_is_seen():
    data = encode(Image.new("RGB", (16, 8), RED), "MPO", save_all=True, append_images=[Image.new("RGB", (16, 8), BLUE)])
    assert open_bytes(data).getpixel((4, 4))[0] > 250


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
def test_each_mode_becomes_rgb(mode):
    image = Image.new("RGB", (8, 8), WHITE)
    if mode.startswith("I"):
        values = np.full((8, 8), 65535, dtype=np.uint16 if mode == "I;16" else np.int32)
        image = Image.fromarray(values)
    else:
        image = image.convert(mode)
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "I", "PA") else "PNG"
    if mode == "PA":
        image = image.convert("RGBA")
    assert open_bytes(encode(image, kind)).getpixel((3, 3)) == WHITE


def test_sixteen_bit_keep_their_upper_eight():
    values = np.array([[0, 0x1234, 0xFFFF]], dtype=np.uint16)
    opened = open_bytes(encode(Image.fromarray(values)))
    assert [opened.getpixel((place, 0))[0] for place in range(3)] == [0, 0x12, 0xFF]


def write_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_of_sixteen_bit_what_is_transparent_is_white():
    whole = encode(Image.fromarray(np.array([[0x1234, 0x1235]], dtype=np.uint16)))
    opened = open_bytes(whole[:33] + write_chunk(b"tRNS", b"\x12\x34") + whole[33:])
    assert [opened.getpixel((place, 0))[0] for place in range(2)] == [255, 0x12]


def test_what_is_half_transparent_is_mixed_with_white():
    values = np.zeros((256, 256, 4), dtype=np.uint8)
    values[..., :3], values[..., 3] = np.arange(256)[:, None, None], np.arange(256)
    share = values[..., 3:] / 255
    opened = np.asarray(open_bytes(encode(Image.fromarray(values))))
    assert np.array_equal(opened, np.rint(values[..., :3] * share + 255 * (1 - share)))


def test_what_is_transparent_is_white():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    opened = open_bytes(encode(image))
    assert (opened.getpixel((0, 0)), opened.getpixel((1, 0))) == (RED, WHITE)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    opened = open_bytes(encode(palette, transparency=0))
    assert (opened.getpixel((0, 0)), opened.getpixel((1, 0))) == (WHITE, BLUE)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_seen(kind):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_bytes(data).getpixel((4, 4)) == RED


def test_an_image_with_too_many_pixels_is_refused_by_its_header():
    rules = ImageRules(99)
    assert find_reason(encode(draw(10, 10)), rules) == (
        "has an image given by its bytes with 10 x 10 pixels and max_image_pixels=99: shrink it, or raise "
        "max_image_pixels."
    )
    assert open_bytes(encode(draw(9, 11)), rules).size == (9, 11)


def test_a_bomb_is_refused_before_it_is_decoded():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + write_chunk(b"IHDR", header)
        + write_chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + write_chunk(b"IEND", b"")
    )
    assert "pixels and max_image_pixels=150000000" in find_reason(bomb, ImageRules(150_000_000))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_that_is_cut_off_is_told(kind):
    data = encode(draw(64, 64), kind)
    reason = find_reason(data[: len(data) // 2])
    assert reason.startswith("has an image given by its bytes, which is")


def look(data):
    """The size of an image by both ways to read it, or the sentence."""
    found = set()
    for read in (inspect_image, lambda *given: open_image(*given).size[::-1]):
        try:
            found.add(read(ImageRef(data=data), RULES))
        except ImageError as error:
            assert str(error).endswith(".")
            found.add("told")
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_whatever_a_damaged_file_holds_is_an_image_or_told_when_it_is_looked_at(kind):
    generator, exif = random.Random(0), Image.Exif()
    exif[images.ORIENTATION] = 6
    whole = encode(draw(16, 9), kind, **({} if kind in ("GIF", "BMP") else {"exif": exif}))
    for number in range(60):
        data = bytearray(whole[: len(whole) - number % 2 * generator.randrange(len(whole) // 2)])
        for _ in range(generator.randrange(1, 20)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        assert len(look(bytes(data))) == 1


@pytest.mark.parametrize("data", [b"", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0", b"PK\x03\x04", b"\0" * 100])
def test_a_file_of_another_kind_is_told(data):
    assert find_reason(data).endswith("which is no JPEG, PNG, WebP, GIF, BMP or TIFF file: convert or remove it.")


def test_fractions_are_refused():
    image = Image.fromarray(np.zeros((4, 4), dtype=np.float32))
    assert "whose pixels are fractions" in find_reason(encode(image, "TIFF"))


def test_an_image_is_found_by_each_value_that_a_row_may_have(place):
    data = encode(draw(3, 2))
    uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    shard = place.file.with_name("a.tar")
    shard.write_bytes(b"before" + data + b"after")
    part = FilePart(shard, 6, len(data), "a.tar:1.png")
    for value in (data, uri, part):
        assert inspect_image(find_image(value, place, RULES), RULES) == (2, 3)
    assert find_image("a.png", place, RULES) == ImageRef(str(place.file.with_name("a.png")), name="a.png")
    assert find_image(part, place, RULES).describe() == "the image a.tar:1.png"


def test_the_files_of_a_sharded_channel_come_with_the_row(place, monkeypatch):
    sharded = ImagePlace(place.file, ImageFolder(place.folder.path, is_sharded=True))
    assert find_image("a.png", sharded, RULES) == ImageRef(
        data=place.file.with_name("a.png").read_bytes(), name="a.png"
    )
    with pytest.raises(ImageError, match="which is not there on this host, as its channel's files are spread over"):
        find_image("of_another_host.png", sharded, RULES)
    draw(400, 400).save(place.file.with_name("large.bmp"))
    monkeypatch.setattr(images, "MAX_HELD_BYTES", 2**17)
    with pytest.raises(ImageError, match=r"has the image large\.bmp of more than 0 MiB: shrink it"):
        find_image("large.bmp", sharded, RULES)


@pytest.mark.parametrize("is_sharded", [False, True])
def test_a_file_that_may_not_be_read_is_told(place, is_sharded, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, "secret path")

    monkeypatch.setattr(ImageRef, "open", refuse)
    with pytest.raises(ImageError, match=r"^has the image a\.png, which cannot be read \(Permission denied\): check"):
        inspect_image(
            find_image("a.png", ImagePlace(place.file, ImageFolder(place.folder.path, is_sharded)), RULES), RULES
        )


def test_a_file_that_has_gone_is_told(place):
    ref = find_image("a.png", place, RULES)
    place.file.with_name("a.png").unlink()
    with pytest.raises(ImageError, match=r"cannot be read \(No such file or directory\): check that it is there"):
        open_image(ref, RULES)


def test_a_name_that_is_not_utf_8_is_told(place):
    name = os.fsdecode(b"\xf6.png")
    draw(4, 4).save(place.file.with_name(name))
    for value in (name, FilePart(place.file, 0, 9, name)):
        with pytest.raises(ImageError, match="whose name is not UTF-8: rename it"):
            find_image(value, place, RULES)


def test_a_part_of_a_file_is_bounded_and_never_the_whole_file(place, monkeypatch):
    empty = find_image(FilePart(place.file.with_name("a.png"), 0, 0, "a.tar:1.png"), place, RULES)
    with pytest.raises(ImageError, match=r"has the image a\.tar:1\.png, which is no JPEG"):
        inspect_image(empty, RULES)
    monkeypatch.setattr(images, "MAX_HELD_BYTES", 8)
    with pytest.raises(ImageError, match=r"has the image a\.tar:1\.png of more than 0 MiB"):
        find_image(FilePart(place.file, 0, 9, "a.tar:1.png"), place, RULES)


@pytest.mark.parametrize("name", ["../outside.png", "/etc/passwd", "deep/../../outside.png", "", " ", "a\0.png"])
def test_a_name_that_leads_out_of_the_channel_is_refused(place, name):
    with pytest.raises(ImageError, match="within its channel"):
        find_image(name, place, RULES)


def test_a_link_out_of_the_channel_is_refused_and_one_within_is_followed(place):
    channel = place.folder.path
    (channel / "out.png").symlink_to(channel.parent / "outside.png")
    (channel / "in.png").symlink_to("a.png")
    (channel / "up").symlink_to(channel.parent)
    for name in ("out.png", "up/outside.png"):
        with pytest.raises(ImageError, match="a link out of its channel"):
            find_image(name, place, RULES)
    assert inspect_image(find_image("in.png", place, RULES), RULES) == (4, 4)


@pytest.mark.parametrize(("name", "reason"), [("b.png", "which is not there"), ("deep", "which is no regular file")])
def test_a_name_of_no_file_is_told(place, name, reason):
    with pytest.raises(ImageError, match=reason):
        find_image(name, place, RULES)


def test_a_row_of_the_hub_names_no_file():
    with pytest.raises(ImageError, match="a Hub data set has no files beside it"):
        find_image("a.png", ImagePlace(None, ImageFolder()), RULES)


@pytest.mark.parametrize("uri", ["data:image/png,abc", "data:image/png;base64,@@@", "data:"])
def test_a_data_uri_that_is_not_base64_is_told(place, uri):
    with pytest.raises(ImageError, match="whose data URI cannot be read"):
        find_image(uri, place, RULES)


@pytest.mark.parametrize(
    "head",
    [
        *("data:image/png;base64", "data:image/jpg;base64", "data:application/octet-stream;base64", "data:;base64"),
        *("DATA:IMAGE/PNG;BASE64", "data:image/png;charset=utf-8;base64", "data:image/x-ms-bmp; base64"),
    ],
)
def test_a_data_uri_of_any_kind_is_read(place, head):
    data = encode(draw(3, 2))
    assert find_image(f"{head},{base64.b64encode(data).decode()}", place, RULES).data == data


@pytest.mark.parametrize(
    "write",
    [
        lambda data: base64.encodebytes(data).decode(),
        lambda data: base64.urlsafe_b64encode(data).decode(),
        lambda data: base64.b64encode(data).decode().rstrip("="),
        lambda data: quote(base64.b64encode(data).decode(), safe=""),
    ],
)
def test_base64_is_read_as_it_is_met(place, write):
    data = encode(draw(9, 5))
    assert find_image(f"data:image/png;base64,{write(data)}", place, RULES).data == data


@pytest.mark.parametrize("address", ["file:///etc/passwd", "FILE:/etc/passwd", "s3://bucket/a.png", "ftp://host/a.png"])
@pytest.mark.parametrize("allow_remote", [False, True])
def test_an_address_that_is_not_http_is_refused(place, address, allow_remote):
    with pytest.raises(ImageError, match=f"at the address '{address}': put the file beside the data, and give its"):
        find_image(address, place, ImageRules(100, allow_remote))


def test_an_address_is_asked_only_if_the_settings_allow_it(place, monkeypatch):
    asked = []

    def answer(address, max_bytes):
        asked.append(address)
        if address.endswith("gone"):
            raise FetchError("does not come (no route)")
        return b"image"

    monkeypatch.setattr(images, "fetch", answer)
    with pytest.raises(ImageError, match="allow_remote_images=true"):
        find_image("https://host/a", place, RULES)
    assert not asked
    open_rules = ImageRules(100, allow_remote=True)
    assert find_image("HTTPS://host/a", place, open_rules) == ImageRef(data=b"image", name="HTTPS://host/a")
    with pytest.raises(ImageError, match=r"at 'https://host/gone', which does not come \(no route\): put the file"):
        find_image("https://host/gone", place, open_rules)


@pytest.mark.parametrize(("kind", "name"), [("PNG", "png"), ("JPEG", "jpeg"), ("MPO", "jpeg"), ("WEBP", "webp")])
def test_an_image_file_becomes_a_data_uri_byte_for_byte(tmp_path, kind, name):
    frames = {"save_all": True, "append_images": [Image.new("RGB", (4, 3))]} if kind == "MPO" else {}
    Image.new("RGB", (4, 3), "red").save(tmp_path / "cat", kind, **frames)
    uri = encode_uri(tmp_path / "cat")
    assert uri.startswith(f"data:image/{name};base64,")
    assert decode_uri(uri) == (tmp_path / "cat").read_bytes()


def test_what_is_no_image_becomes_no_data_uri(tmp_path):
    (tmp_path / "cat.png").write_text("cat")
    for name in ("cat.png", "dog.png", "."):
        with pytest.raises(ImageError, match=r"is no JPEG, PNG, .* file that can be read: give one"):
            encode_uri(tmp_path / name)


def test_a_text_in_a_png_that_unpacks_to_much_is_refused():
    whole = encode(draw(4, 4))
    bomb = write_chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(100 * 2**20)))
    assert "Decompressed data too large" in find_reason(whole[:33] + bomb + whole[33:])


SIGNED = "https://me:pass@host/Zw%C3%B6lf%20a.png?X-Amz-Signature=5ec2e7&x=5ec2e7#5ec2e7"


@pytest.mark.parametrize("address", [SIGNED, "https://me:pass@host/Zwölf a.png?a=5ec2e7", "HTTPS://host/a.png#5ec2e7"])
def test_a_signed_address_is_asked_whole_and_shown_without_what_signs_it(place, monkeypatch, address):
    asked = []

    def answer(address, max_bytes):
        asked.append(address)
        if "gone" in address:
            raise FetchError("does not come")
        return b"image"

    monkeypatch.setattr(images, "fetch", answer)
    told = [find_image(address, place, ImageRules(100, allow_remote=True)).describe()]
    assert asked == [quote(address, safe="%:/@?&=#")]
    for value, rules in ((address, RULES), (f"{address}gone", ImageRules(100, True)), (f"s3{address[5:]}", RULES)):
        with pytest.raises(ImageError) as error:
            find_image(value, place, rules)
        told.append(str(error.value))
    assert not re.search("5ec2e7|pass|X-Amz", "".join(told))
    assert all("a.png" in text for text in told)
