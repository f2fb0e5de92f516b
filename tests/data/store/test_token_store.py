import copy
import hashlib
import json
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest

from flax_transformers.data.prepare.shard_writer import ShardWriter
from flax_transformers.data.store import token_store as store_module
from flax_transformers.data.store.files import sealed
from flax_transformers.data.store.token_store import TokenStore, add_counts
from flax_transformers.errors import UserError
from flax_transformers.storage.folders import LocalFolder, open_folder

# Two documents, an empty shard, one document: tokens 0..9 in global positions.
SHARDS = ([[[10, 11], [12]], [[13, 14, 15]]], [], [[[16], [17, 18, 19]]])


def test_tokens_are_one_array_over_all_shards(make_store):
    store = make_store(*SHARDS)
    everything = np.arange(10, 20, dtype=np.int32)
    for start in range(11):
        for length in range(11 - start):
            read = store.tokens(start, length)
            assert read.dtype == np.int32
            np.testing.assert_array_equal(read, everything[start : start + length])


def test_ends_are_in_global_positions(make_store):
    store = make_store(*SHARDS)
    assert store.document_ends.tolist() == [3, 6, 10]
    assert store.sentence_ends.tolist() == [2, 3, 6, 7, 10]
    assert store.document_ends.dtype == store.sentence_ends.dtype == np.int64


def test_document_ends_within_leaves_out_the_start_and_takes_in_the_stop(make_store):
    store = make_store(*SHARDS)
    for start in range(11):
        for stop in range(start, 11):
            expected = [end for end in (3, 6, 10) if start < end <= stop]
            assert store.document_ends_within(start, stop).tolist() == expected


def test_counts_are_those_of_what_was_added(make_store):
    store = make_store(*SHARDS)
    assert (store.num_tokens, store.num_documents, store.num_sentences) == (10, 3, 5)


def test_sentences_and_documents_without_tokens_leave_no_trace_in_the_positions(make_store):
    store = make_store([[[], [5], []], [[]], [[6]]])
    assert store.tokens(0, 2).tolist() == [5, 6]
    assert store.sentence_ends.tolist() == store.document_ends.tolist() == [1, 2]


@pytest.mark.parametrize(("vocab_size", "width"), [(65_536, 2), (65_537, 4)])
def test_the_highest_id_fits_the_token_type(make_store, tmp_path, vocab_size, width):
    store = make_store([[[vocab_size - 1, 0]]], vocab_size=vocab_size)
    assert store.tokens(0, 2).tolist() == [vocab_size - 1, 0]
    assert (tmp_path / "store/train/00000.tokens").stat().st_size == 2 * width


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 11), (10, 1), (3, -1)])
def test_reading_outside_of_the_split_raises(make_store, start, length):
    with pytest.raises(IndexError):
        make_store(*SHARDS).tokens(start, length)


def test_a_bucket_reads_as_a_local_folder_does(make_store, tmp_path):
    local = make_store(*SHARDS)
    bucket = TokenStore(f"file://{tmp_path}/store")
    assert not bucket.is_local
    assert bucket.fingerprint == local.fingerprint
    for start in range(11):
        assert bucket.tokens(start, 10 - start).tolist() == local.tokens(start, 10 - start).tolist()
    assert bucket.document_ends_within(2, 10).tolist() == [3, 6, 10]
    assert bucket.sentence_ends.tolist() == local.sentence_ends.tolist()
    assert bucket.unigram_counts.tolist() == local.unigram_counts.tolist()
    bucket.verify()


def test_a_bucket_is_read_by_ranges_not_whole(make_store, tmp_path, monkeypatch):
    make_store([[list(range(900))]])
    bucket = TokenStore(f"file://{tmp_path}/store")
    folder = bucket._reader.folder
    read, asked = folder.read, []
    monkeypatch.setattr(folder, "read", lambda *a: asked.append(a) or read(*a))
    assert bucket.tokens(100, 3).tolist() == [100, 101, 102]
    assert asked == [("train/00000.tokens", 200, 206)]


def test_a_store_written_to_a_bucket_has_the_same_bytes(make_store, tmp_path):
    make_store(*SHARDS, directory=tmp_path / "local")
    make_store(*SHARDS, directory=f"file://{tmp_path}/bucket")
    local, bucket = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "local", tmp_path / "bucket")
    )
    assert local == bucket
    assert len(local) == 3 * 2 * 3 + 2 + 1


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_an_opened_store_is_pickled_without_its_arrays(make_store, tmp_path, scheme):
    make_store([[list(range(1000))] * 20])
    store = TokenStore(f"{scheme}{tmp_path}/store")
    store.tokens(0, 20_000)
    assert len(ForkingPickler.dumps(store)) < 3000
    assert copy.deepcopy(store).tokens(999, 2).tolist() == [999, 0]


def test_unigram_counts_are_how_often_each_id_occurs(make_store):
    store = make_store([[[1, 2, 2]]], [[[2, 0]]], vocab_size=4)
    assert store.unigram_counts.tolist() == [1, 1, 3, 0]
    counts = np.array([5, 0], np.int64)
    add_counts(counts, np.array([1, 0, 1, 1], np.uint16))
    assert counts.tolist() == [6, 3]


def test_in_format_1_every_shard_has_its_unigram_counts(make_store, tmp_path):
    made = make_store([[[1, 2, 2]]], [[[2, 0]]], vocab_size=4)
    manifest = json.loads((tmp_path / "store/manifest.json").read_text())
    (tmp_path / "store/train/unigrams").unlink()
    for shard, counts in enumerate(([0, 1, 2, 0], [1, 0, 1, 0])):
        content = np.array(counts, "<i8").tobytes()
        (tmp_path / f"store/train/{shard:05d}.unigrams").write_bytes(content)
        record = {"bytes": 32, "sha256": hashlib.sha256(content).hexdigest()}
        manifest["splits"]["train"][shard]["files"][f"train/{shard:05d}.unigrams"] = record
    body = {k: v for k, v in manifest.items() if k not in ("unigrams", "fingerprint")}
    (tmp_path / "store/manifest.json").write_bytes(sealed({**body, "format": 1}))
    store = TokenStore(made.directory)
    store.verify()
    assert store.unigram_counts.tolist() == [1, 1, 3, 0]


def test_a_writer_that_fails_leaves_no_file(tmp_path):
    def fail():
        with ShardWriter(open_folder(tmp_path), "train", 0, 10) as writer:
            writer.add_document([np.array([1])])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_nothing_has_its_name_before_the_shard_is_finished(tmp_path):
    with ShardWriter(open_folder(tmp_path), "train", 0, 10) as writer:
        writer.add_document([np.array([1])])
        assert [path for path in tmp_path.rglob("*") if path.suffix == ".tokens"] == []
        writer.finish()
    assert (tmp_path / "train/00000.tokens").read_bytes() == b"\x01\x00"


def test_two_splits_of_a_store_have_different_fingerprints(make_store):
    train = make_store(*SHARDS)
    assert train.fingerprint != TokenStore(train.directory, "validation").fingerprint


def test_a_missing_store_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match=r"no token store in .*/absent; .* prepare"):
        TokenStore(tmp_path / "absent")


def test_a_missing_store_in_a_bucket_says_so_too(tmp_path):
    with pytest.raises(UserError, match="no token store in file://"):
        TokenStore(f"file://{tmp_path}/absent")


FILES = ["00002.tokens", "00002.documents", "00002.sentences", "unigrams"]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named_on_opening(make_store, tmp_path, name):
    make_store(*SHARDS)
    path = tmp_path / f"store/train/{name}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"train/{name} .*damaged"):
        TokenStore(tmp_path / "store")


def test_a_lost_file_is_named_on_opening(make_store, tmp_path):
    make_store(*SHARDS)
    (tmp_path / "store/train/00000.tokens").unlink()
    with pytest.raises(UserError, match=r"train/00000.tokens .*no bytes instead of 12"):
        TokenStore(tmp_path / "store")


def test_a_truncated_file_in_a_bucket_is_named_on_reading(make_store, tmp_path):
    make_store(*SHARDS)
    path = tmp_path / "store/train/00002.tokens"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"train/00002.tokens .*damaged"):
        TokenStore(f"file://{tmp_path}/store").tokens(6, 4)


def test_of_a_bucket_the_sizes_of_all_files_are_compared_and_no_content_is_read(
    make_store, tmp_path, monkeypatch
):
    make_store(*SHARDS)
    bucket = TokenStore(f"file://{tmp_path}/store")
    folder, asked = bucket._reader.folder, []
    read = folder.read
    monkeypatch.setattr(folder, "read", lambda *a: asked.append(a) or read(*a))
    bucket.verify_on_opening()
    assert sorted(name for name, *_ in asked) == sorted(bucket._files)
    sizes = {name: record.bytes for name, (record, _) in bucket._files.items()}
    assert all(start == max(0, sizes[name] - 1) for name, start in asked)
    (tmp_path / "store/train/00001.sentences").unlink()
    with pytest.raises(UserError, match=r"train/00001.sentences .*damaged.*it is missing"):
        bucket.verify_on_opening()


@pytest.mark.parametrize(
    ("change", "wrong"),
    [(lambda b: b[:-1], "fewer"), (lambda b: b + b"x", "more"), (lambda b: b"", "fewer")],
    ids=["cut", "longer", "empty"],
)
@pytest.mark.parametrize("name", ["train/00002.tokens", "train/00000.documents"])
def test_a_file_of_another_size_in_a_bucket_is_named_on_opening(
    make_store, tmp_path, name, change, wrong
):
    make_store(*SHARDS)
    path = tmp_path / "store" / name
    size = len(path.read_bytes())
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=rf"{name} .*damaged.*it has {wrong} than {size} bytes"):
        TokenStore(f"file://{tmp_path}/store").verify_on_opening()


def test_the_document_of_a_position_is_found_over_all_shards(make_store):
    store = make_store([[[1, 2]], [[3]]], [], [[[4, 5, 6]]])
    assert [store.document_of(position) for position in range(6)] == [0, 0, 1, 2, 2, 2]
    store._shards = None  # no shard is looked at for it
    assert store.document_of(5) == 2


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_found_by_verify(make_store, tmp_path, name):
    store = make_store(*SHARDS)
    store.verify()
    path = tmp_path / f"store/train/{name}"
    whole = path.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 16)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(damaged))
        with pytest.raises(UserError, match=f"train/{name} .*damaged"):
            store.verify()


def test_bytes_added_to_a_file_are_found_by_verify(make_store, tmp_path):
    store = make_store(*SHARDS)
    path = tmp_path / "store/train/00000.tokens"
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(UserError, match=r"00000.tokens"):
        store.verify()


def test_any_changed_figure_in_the_manifest_is_found_on_opening(make_store, tmp_path):
    make_store(*SHARDS)
    path = tmp_path / "store/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["splits"]["train"][0]["tokens"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest.json .*damaged"):
        TokenStore(tmp_path / "store")


def test_a_manifest_that_is_no_json_is_found_on_opening(make_store, tmp_path):
    make_store(*SHARDS)
    (tmp_path / "store/manifest.json").write_bytes(b"\xff[]")
    with pytest.raises(UserError, match=r"manifest.json .*damaged"):
        TokenStore(tmp_path / "store")


def test_another_format_is_refused_with_both_numbers(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "FORMAT", 7)
    make_store(*SHARDS)
    monkeypatch.undo()
    with pytest.raises(UserError, match="has format 7, this version reads format 2"):
        TokenStore(tmp_path / "store")


def test_another_tokenizer_is_refused_with_both_names(make_store, tmp_path):
    make_store(*SHARDS)
    TokenStore(tmp_path / "store", tokenizer="tok")
    with pytest.raises(UserError, match="made with tokenizer tok, not with another"):
        TokenStore(tmp_path / "store", tokenizer="another")


def test_a_file_is_replaced_as_a_whole_under_its_readers(tmp_path):
    folder = LocalFolder(str(tmp_path))
    folder.write("a", b"the old content")
    with (tmp_path / "a").open("rb") as reader:
        folder.write("a", b"new")
        assert reader.read() == b"the old content"
    assert folder.read("a") == b"new"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"Could not write in .*/file/store: Not a directory"):
        LocalFolder(str(tmp_path / "file/store")).write("a", b"")


def test_a_bucket_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"Could not write in file://.*/file/store"):
        open_folder(f"file://{tmp_path}/file/store").write("a", b"")


def test_names_are_the_files_directly_below_a_prefix(tmp_path):
    for name in ("t/b", "t/a", "t/deeper/c", "u/d"):
        LocalFolder(str(tmp_path)).write(name, b"x")
    assert open_folder(tmp_path).names("t/") == ["t/a", "t/b"]
    assert open_folder(f"file://{tmp_path}").names("t/") == ["t/a", "t/b"]
    assert Path(tmp_path, "t/deeper/c").read_bytes() == b"x"


def test_a_store_of_format_1_is_still_read(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "FORMAT", 1)
    written = make_store(*SHARDS)
    monkeypatch.undo()
    store = TokenStore(tmp_path / "store")
    assert json.loads((tmp_path / "store/manifest.json").read_text())["format"] == 1
    assert store.fingerprint == written.fingerprint
    assert store.document_ends.tolist() == written.document_ends.tolist()


@pytest.mark.parametrize("of", [1, 2, 3, 50])
def test_every_file_is_in_the_share_of_one_of_the_processes_that_verify(make_store, of):
    store = make_store([[[1, 2, 3]]], [[[4, 5]], [[6]]])
    for place in ("", "file://"):
        opened = TokenStore(f"{place}{store.directory}")
        for file in sorted(Path(store.directory, "train").iterdir()):
            content = file.read_bytes()
            file.write_bytes(bytes([content[0] ^ 1]) + content[1:] + b"x" * bool(place))
            found = 0
            for number in range(of):
                try:
                    opened.verify_on_opening(number, of)
                except UserError:
                    found += 1
            assert found == 1
            file.write_bytes(content)
