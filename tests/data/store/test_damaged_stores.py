"""Opening a store with damaged files raises one error that names a file.

`prepare` and `open_dataset` are what `train` calls before its first step, in one process and in
several.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import Dataset, open_dataset, prepare
from flax_transformers.data.images.store import FORMAT as IMAGE_FORMAT
from flax_transformers.data.pipeline.loader import TrainStream
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.store.files import DIGEST, sealed
from flax_transformers.data.store.token_store import FORMAT as TOKEN_FORMAT
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.images import ImageSpec
from flax_transformers.objectives.labelled import LabelledSpec
from tests.data.images.test_dataset import data as image_data
from tests.data.images.test_dataset import write_folder, write_idx


@dataclass(frozen=True)
class Store:
    """A store that a test may damage, and the names of its files by what they hold."""

    path: Path
    data: Any
    names: dict[str, str]
    dtypes: dict[str, str]

    def file(self, kind: str) -> Path:
        return self.path / self.names[kind]

    def array(self, kind: str) -> np.ndarray:
        return np.fromfile(self.file(kind), self.dtypes[kind])

    def reseal(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Changes the manifest and gives it the digest of what it says then."""
        path = self.path / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_bytes(sealed({k: v for k, v in manifest.items() if k != DIGEST}))

    def record(self, manifest: dict[str, Any], kind: str) -> dict[str, Any]:
        train = manifest["splits"]["train"]
        return (
            train[0]["files"][self.names[kind]] if isinstance(train, list) else train["files"][kind]
        )

    def forge(self, kind: str, values: np.ndarray) -> None:
        """Replaces a file, and the digests of it and of the manifest with it."""
        import hashlib

        content = values.astype(self.dtypes[kind]).tobytes()
        self.file(kind).write_bytes(content)
        new = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        self.reseal(lambda manifest: self.record(manifest, kind).update(new))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """A store of either kind, intact."""
    root = tmp_path_factory.mktemp("made")
    rows = [{"text": f"Row {i} of {i % 7}.", "label": "abc"[i % 3]} for i in range(90)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = TextData(
        source=LabelledSource(str(root / "rows.jsonl")),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.3,
        shards=2,
        store=str(root / "text"),
    )
    images = image_data(write_idx(root / "mnist"), store=str(root / "images"))
    prepare(text)
    prepare(images)
    kinds = ("tokens", "documents", "sentences", "unigrams", "labels", "label_ends")
    return {
        "text": Store(
            root / "text",
            text,
            {
                "content": "train/00000.tokens",
                "ends": "train/00000.documents",
                **{kind: f"train/00000.{kind}" for kind in kinds},
            },
            {"content": "<u2", "tokens": "<u2", "labels": "<i4", "ends": "<i8"}
            | dict.fromkeys(("documents", "sentences", "unigrams", "label_ends"), "<i8"),
        ),
        "images": Store(
            root / "images",
            images,
            {"content": "train/items", **{k: f"train/{k}" for k in ("items", "labels", "ends")}},
            {"content": "u1", "items": "u1", "labels": "<i4", "ends": "<i8"},
        ),
    }


@pytest.fixture
def copied(made, tmp_path) -> Callable[[str], Store]:
    def copy(kind: str) -> Store:
        shutil.copytree(made[kind].path, tmp_path / kind)
        data = replace(made[kind].data, store=str(tmp_path / kind))
        return replace(made[kind], path=tmp_path / kind, data=data)

    return copy


def _change(kind: str, change: Callable[[bytes], bytes]) -> Callable[[Store], None]:
    def damage(store: Store) -> None:
        store.file(kind).write_bytes(change(store.file(kind).read_bytes()))

    return damage


def _flip(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :]


def _swap(store: Store) -> None:
    content, ends = store.file("content"), store.file("ends")
    one, other = content.read_bytes(), ends.read_bytes()
    content.write_bytes(other)
    ends.write_bytes(one)


def _swap_splits(store: Store) -> None:
    name = store.names["labels"]
    one, other = store.path / name, store.path / name.replace("train", "validation")
    contents = one.read_bytes(), other.read_bytes()
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def _roll(store: Store) -> None:
    labels = store.array("labels")
    assert (np.roll(labels, 1) != labels).any()
    np.roll(labels, 1).tofile(store.file("labels"))


def _directory(store: Store) -> None:
    store.file("labels").unlink()
    store.file("labels").mkdir()


def _link_to_nothing(store: Store) -> None:
    store.file("content").unlink()
    store.file("content").symlink_to("nowhere")


def _not_increasing(store: Store) -> None:
    ends = store.array("ends")
    ends[[1, 2]] = ends[[2, 1]]
    store.forge("ends", ends)


def _repeated_end(store: Store) -> None:
    ends = store.array("ends")
    ends[1] = ends[0]
    store.forge("ends", ends)


def _ends_beyond(store: Store) -> None:
    ends = store.array("ends")
    ends[-1] += 1
    store.forge("ends", ends)


def _label_out_of_range(store: Store) -> None:
    labels = store.array("labels")
    labels[3] = 3
    store.forge("labels", labels)


def _negative_label(store: Store) -> None:
    labels = store.array("labels")
    labels[-1] = -1
    store.forge("labels", labels)


def _count(change: int) -> Callable[[dict[str, Any]], None]:
    def damage(manifest: dict[str, Any]) -> None:
        train = manifest["splits"]["train"]
        if isinstance(train, list):
            train[0]["documents"] += change
        else:
            train["images"] += change

    return damage


def _false_count_unsealed(store: Store) -> None:
    path = store.path / "manifest.json"
    manifest = json.loads(path.read_text())
    _count(-1)(manifest)
    path.write_text(json.dumps(manifest))


def _manifest(content: bytes) -> Callable[[Store], None]:
    return lambda store: (store.path / "manifest.json").write_bytes(content) and None


def _without(*keys: str) -> Callable[[Store], None]:
    def change(manifest: dict[str, Any]) -> None:
        inner = manifest
        for key in keys[:-1]:
            inner = inner[key]
            inner = inner[0] if isinstance(inner, list) else inner
        del inner[keys[-1]]

    return lambda store: store.reseal(change)


def _format(number: object) -> Callable[[Store], None]:
    return lambda store: store.reseal(lambda manifest: manifest.update(format=number))


def _record_of_nothing(store: Store) -> None:
    store.reseal(lambda manifest: store.record(manifest, "labels").update(bytes="many"))


DAMAGES: dict[str, tuple[Callable[[Store], None], str]] = {
    "a byte cut off": (_change("content", lambda c: c[:-1]), "content"),
    "half cut off": (_change("ends", lambda c: c[: len(c) // 2]), "ends"),
    "empty": (_change("labels", lambda c: b""), "labels"),
    "extended": (_change("content", lambda c: c + b"\0\0"), "content"),
    "extended by itself": (_change("labels", lambda c: c + c), "labels"),
    "missing": (lambda store: store.file("ends").unlink(), "ends"),
    "a directory in its place": (_directory, "labels"),
    "a link to nothing": (_link_to_nothing, "content"),
    "one bit flipped": (_change("content", _flip), "content"),
    "one bit of the ends flipped": (_change("ends", _flip), "ends"),
    "a block of zeros": (_change("content", lambda c: bytes(40) + c[40:]), "content"),
    "all zeros": (_change("labels", lambda c: bytes(len(c))), "labels"),
    "other bytes": (_change("content", lambda c: c[::-1]), "content"),
    "labels rolled": (_roll, "labels"),
    "files swapped": (_swap, "content|ends"),
    "splits swapped": (_swap_splits, "labels"),
    "ends that decrease": (_not_increasing, "ends"),
    "an item of no length": (_repeated_end, "ends"),
    "an end beyond the items": (_ends_beyond, "ends"),
    "a label that is no class": (_label_out_of_range, "labels"),
    "a negative label": (_negative_label, "labels"),
    "a count one too many": (lambda store: store.reseal(_count(1)), "ends|labels"),
    "a count one too few": (lambda store: store.reseal(_count(-1)), "ends|labels"),
    "a count below zero": (lambda store: store.reseal(_count(-1000)), "ends|labels"),
    "a false count without a digest": (_false_count_unsealed, "manifest"),
    "no manifest but zeros": (_manifest(bytes(500)), "manifest"),
    "an empty manifest": (_manifest(b""), "manifest"),
    "half a manifest": (_manifest(b'{"format": 1, "splits": {'), "manifest"),
    "a manifest that is a list": (_manifest(b"[]"), "manifest"),
    "a manifest nested without end": (_manifest(b"[" * 100_000), "manifest"),
    "no splits": (_without("splits"), "manifest"),
    "no training split": (_without("splits", "train"), "manifest"),
    "no files": (_without("splits", "train", "files"), "manifest"),
    "a size that is no number": (_record_of_nothing, "manifest|labels"),
}


@pytest.mark.parametrize("kind", ["text", "images"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_refused_before_it_is_used(copied, kind, damage):
    store = copied(kind)
    make, expected = DAMAGES[damage]
    make(store)
    names = {store.names.get(name, f"{name}.json") for name in expected.split("|")}
    for opening in (prepare, open_dataset):
        with pytest.raises(UserError) as caught:
            opening(store.data)
        said = str(caught.value)
        assert any(f"The file {name} of the " in said for name in names), said
        assert str(store.path) in said and "\n" not in said and said.endswith(").")


@pytest.mark.parametrize(("kind", "format"), [("text", TOKEN_FORMAT), ("images", IMAGE_FORMAT)])
@pytest.mark.parametrize("found", [0, 99, None, "3", [3]])
def test_a_store_of_another_format_is_refused_with_both_numbers(copied, kind, format, found):
    store = copied(kind)
    _format(found)(store)
    with pytest.raises(UserError) as caught:
        open_dataset(store.data)
    assert f"has format {found}, this version reads format {format}" in str(caught.value)


def test_ids_beyond_the_vocabulary_are_refused(copied):
    store = copied("text")
    tokens = store.array("tokens")
    tokens[5] = 262  # bytes have 262 ids
    store.forge("tokens", tokens)
    with pytest.raises(UserError, match=r"train/00000.tokens .*contains 262, .* from 0 to 261"):
        prepare(store.data)


def test_another_type_of_tokens_is_refused(copied):
    store = copied("text")
    store.reseal(lambda manifest: manifest.update(vocab_size=70_000))  # of 32 bits then
    with pytest.raises(UserError, match="00000.tokens of the token store .* is damaged"):
        prepare(store.data)


def test_a_sentence_that_ends_beyond_its_document_is_refused(copied):
    store = copied("text")
    ends = store.array("sentences")
    store.forge("sentences", ends + 1)
    with pytest.raises(UserError, match=r"00000.sentences .*its last entry is \d+ instead of"):
        prepare(store.data)


def test_the_error_for_a_file_that_may_not_be_read_does_not_call_it_damaged(copied, monkeypatch):
    for kind in ("text", "images"):
        store, intact = copied(kind), os.open

        def refused(path, *arguments, store=store, intact=intact):
            if str(path) == str(store.file("labels")):
                raise PermissionError(13, "Permission denied")
            return intact(path, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(os, "open", refused)
            with pytest.raises(
                UserError, match=r"labels of the .* cannot be read \(Perm"
            ) as caught:
                prepare(store.data)
        assert "damaged" not in str(caught.value)
        prepare(store.data)


def test_without_verifying_sizes_alone_are_compared(copied):
    for kind in ("text", "images"):
        store = copied(kind)
        _roll(store)
        unverified = replace(store.data, verify=False)
        assert prepare(unverified).fingerprint == open_dataset(unverified).fingerprint
        store.file("content").write_bytes(store.file("content").read_bytes()[:-1])
        with pytest.raises(UserError, match="is damaged"):
            prepare(unverified)


def _texts(prepared: Dataset):
    spec = LabelledSpec(length=16, cross_documents=False)
    return prepared.examples("train", spec)


def _images(prepared: Dataset):
    return prepared.examples("train", ImageSpec(length=8))


@pytest.mark.parametrize("kind", ["text", "images"])
@pytest.mark.parametrize("left", [0, 7])
def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(copied, kind, left):
    """A file mapped into memory would end the process with SIGBUS, or give zeros."""
    store = copied(kind)
    examples = (_texts if kind == "text" else _images)(prepare(store.data))
    rng = np.random.default_rng(0)
    examples.read(len(examples) - 1, rng)
    os.truncate(store.file("content"), left)
    with pytest.raises(UserError, match=f"{store.names['content']} of the .* ends too early"):
        [examples.read(index, rng) for index in range(len(examples))]


@pytest.mark.multi_process
def test_a_file_that_is_cut_short_raises_in_a_worker_too(copied):
    store = copied("images")
    prepared = prepare(store.data)
    objective = ImageClassification(mean=(0.5,), std=(0.5,))
    stream = TrainStream(
        prepared.examples("train", objective.window_spec(8)),
        objective,
        prepared.vocabulary,
        sequence_length=8,
        batch_size=8,
        seed=0,
        workers=1,
    )
    with stream:
        next(stream)
        os.truncate(store.file("content"), 0)
        with pytest.raises(UserError, match="train/items of the .* ends too early"):
            [next(stream) for _ in range(20)]


@pytest.mark.parametrize("damage", ["recoded", "swapped", "gone"])
def test_an_image_that_is_read_in_place_is_the_one_that_was_prepared(tmp_path, damage):
    data = image_data(write_folder(tmp_path / "pets"), store=str(tmp_path / "store"))
    prepared = prepare(data)
    image = tmp_path / "pets/train/cat/2.png"
    assert prepared.train.pixels(2, 3).shape == (8, 8, 3)
    if damage == "recoded":
        image.write_bytes(image.read_bytes() + b" ")
    elif damage == "swapped":
        image.write_bytes((tmp_path / "pets/train/dog/2.png").read_bytes())
    else:
        image.unlink()
    why = "No such file" if damage == "gone" else "its content has changed"
    with pytest.raises(UserError, match=f"Image train/cat/2.png of .* is no longer .*{why}"):
        prepared.train.pixels(2, 3)
    assert prepared.train.pixels(3, 3).shape == (8, 8, 3)


def test_the_format_before_is_read_and_its_files_are_verified(copied):
    """Format 2 of image stores noted no sizes, and no digest of its manifest."""
    store = copied("images")

    def of_format_2() -> None:
        path = store.path / "manifest.json"
        manifest = json.loads(path.read_text())
        for split in manifest["splits"].values():
            split["files"] = {kind: file["sha256"] for kind, file in split["files"].items()}
        kept = {key: manifest[key] for key in ("origin", "classes", "skipped", "splits")}
        path.write_text(json.dumps({"format": 2, **kept}))

    fingerprint = prepare(store.data).fingerprint
    of_format_2()
    assert prepare(store.data).fingerprint == open_dataset(store.data).fingerprint == fingerprint
    _roll(store)
    with pytest.raises(UserError, match="train/labels of the image store .* sha256"):
        prepare(store.data)
