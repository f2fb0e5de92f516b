"""Reading corpus files: compressed ones, and from the middle."""

import bz2
import gzip
import lzma
import os

import pytest
import zstandard

from flax_transformers.data.sources import files
from flax_transformers.data.sources.files import (
    Stream,
    is_blank_before,
    line_start,
    open_decompressed,
    reading_source,
)
from flax_transformers.errors import UserError


def read(path):
    with reading_source(path), open_decompressed(path) as file:
        return file.read()


@pytest.mark.parametrize("block", [1, 7, 4096])
def test_members_of_a_gzip_file_are_read_one_after_another(tmp_path, monkeypatch, block):
    monkeypatch.setattr(files, "_BLOCK", block)
    path = tmp_path / "a.gz"
    one, two = os.urandom(9000), b"two" * 5000
    path.write_bytes(gzip.compress(one) + gzip.compress(b"") + b"\0" * 9 + gzip.compress(two))
    assert read(path) == one + two
    path.write_bytes(path.read_bytes() + b"\0" * 5000)
    assert read(path) == one + two


@pytest.mark.parametrize(
    "end", [b"garbage", gzip.compress(b"three", mtime=0)[:-3]], ids=["garbage", "cut short"]
)
def test_data_after_a_member_that_is_not_a_member_is_an_error(tmp_path, end):
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"one") + end)
    with pytest.raises(UserError, match=r"gzip file .*a\.gz is cut short or damaged"):
        read(path)


def test_the_position_of_a_byte_is_that_of_the_block_it_came_out_of(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK", 100)
    content = os.urandom(1000)  # hardly compressed
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(content))
    with Stream(path) as stream:
        found = []
        for offset in range(len(content)):
            assert stream.file.read(1) == content[offset : offset + 1]
            found.append(stream.position(offset))
    assert found[0] == 0 and found == sorted(found)
    assert sorted(set(found)) == list(range(0, 1001, 100))
    with Stream(tmp_path / "a.gz") as stream:  # the same however much is read at once
        stream.file.read()
        assert [stream.position(offset) for offset in range(len(content))] == found


def test_a_line_belongs_to_where_it_begins(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"ab\ncd\n\nef")
    with path.open("rb") as file:
        starts = [line_start(file, start, None) for start in range(9)]
        assert starts == [0, 3, 3, 3, 6, 6, 6, 7, None]
        assert [line_start(file, 4, stop) for stop in (5, 6, 7)] == [None, None, 6]
        line_start(file, 7, None)
        assert file.read() == b"ef"


def test_a_blank_line_is_seen_from_behind_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n" + b" " * 700 + b"\r\nx" + b" " * 700 + b"\n\ny")
    content = path.read_bytes()
    starts = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    with path.open("rb") as file:
        assert [is_blank_before(file, start) for start in starts] == [True, True, False, True]
        assert file.read() == b"y"


def in_blocks(content):
    """As pzstd writes it: a frame that is skipped before each frame."""
    skipped = (0x184D2A50).to_bytes(4, "little") + (4).to_bytes(4, "little") + b"size"
    return skipped + zstandard.compress(content)


def with_long_window(content):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    return zstandard.ZstdCompressor(compression_params=parameters).compress(content)


FORMATS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
    "frames.zst": in_blocks,
    "long.zst": with_long_window,
}


@pytest.mark.parametrize("block", [7, 4096])
@pytest.mark.parametrize("kind", FORMATS)
def test_members_of_every_compressed_format_are_read_one_after_another(
    kind, block, tmp_path, monkeypatch
):
    monkeypatch.setattr(files, "_BLOCK", block)
    path, compress = tmp_path / f"a.{kind}", FORMATS[kind]
    one, two = os.urandom(9000), b"two" * 5000
    path.write_bytes(compress(one) + compress(b"") + compress(two))
    assert read(path) == one + two


@pytest.mark.parametrize("kind", FORMATS)
def test_a_compressed_file_that_is_cut_short_or_something_else_is_refused(kind, tmp_path):
    name = {"gz": "gzip", "bz2": "bzip2", "xz": "xz"}.get(kind, "zstd")
    path, content = tmp_path / f"a.{kind}", FORMATS[kind](os.urandom(9000))
    for damaged in (content[: len(content) // 2], content[:-1], content + b"garbage", b"plain"):
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=rf"The {name} file .*a\.{kind} is cut short or damaged"
        ):
            read(path)
