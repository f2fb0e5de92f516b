"""Token stores in both kinds of buckets, against emulators."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from flax_transformers.cli.main import main
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.errors import UserError
from flax_transformers.storage.folders import open_folder
from flax_transformers.testing import write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.multi_process]

TINY = str(Path(__file__).parents[2] / "configs" / "bert_tiny.py")


@pytest.fixture(params=("gs", "s3"))
def place(request, emulators):
    """A folder of a bucket that nobody has used yet."""
    return f"{request.param}://bucket/{uuid.uuid4().hex}"


def test_files_are_read_by_ranges_listed_and_deleted(place):
    folder = open_folder(place)
    folder.write("a/x", b"hello world")
    folder.write("a/empty", b"")
    folder.write("a/b/deeper", b"1")
    assert folder.names("a/") == ["a/empty", "a/x"]
    assert folder.read("a/x", 4, 100) == b"o world"
    assert folder.read("a/x", 50, 100) == folder.read("a/empty", 0, 10) == b""
    folder.delete("a/x")
    assert not folder.exists("a/x") and folder.exists("a/empty")
    with pytest.raises(FileNotFoundError):
        folder.read("a/x")


def test_a_store_in_a_bucket_equals_a_local_one_and_a_damaged_file_is_named(place, tmp_path):
    write_corpus(tmp_path / "text.txt")
    same = [
        *("--data.source.path", str(tmp_path / "text.txt"), "--data.validation-fraction", "0"),
        *("--data.tokenizer.kind", "bytes", "--data.tokenizer.lowercase", "False"),
    ]
    assert main(["prepare", TINY, *same, "--data.store", place]) == 0
    assert main(["prepare", TINY, *same, "--data.store", str(tmp_path / "store")]) == 0
    local, remote = TokenStore(tmp_path / "store"), TokenStore(place)
    remote.verify()
    assert remote.fingerprint == local.fingerprint
    assert remote.tokens(5, 900).tolist() == local.tokens(5, 900).tolist()

    content = bytearray(open_folder(place).read("train/00000.tokens"))
    content[7] ^= 1
    open_folder(place).write("train/00000.tokens", bytes(content))
    with pytest.raises(UserError, match=r"train/00000\.tokens .* is damaged"):
        TokenStore(place).verify()
