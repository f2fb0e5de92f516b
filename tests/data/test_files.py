"""How the bytes of a corpus file are read: compressed ones, and from the middle."""

import gzip
import os

import pytest

from flax_transformers.data import files
from flax_transformers.data.files import Stream, is_blank_before, line_start, open_file, reading
from flax_transformers.errors import UserError


def read(path):
    with reading(path), open_file(path) as file:
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


@pytest.mark.parametrize("end", [b"garbage", gzip.compress(b"three")[:-3]])
def test_what_is_no_member_behind_a_member_is_refused(tmp_path, end):
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
