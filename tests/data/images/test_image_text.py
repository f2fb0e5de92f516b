"""Pairs of images and captions from every kind of source; tokenizers; equal examples."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.dataset import open_dataset, prepare
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.image_text import ClassTexts, ImageTextData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.images.sources import open_images
from flax_transformers.data.images.store import SKIPPED
from flax_transformers.data.pipeline.loader import TrainStream
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.objectives.images import ImageSpec
from tests.data.images.test_dataset import SIDE, pixels, png, write_idx

COUNT, LENGTH = 5, 40
OBJECTIVE = ImageTextContrastive(image_size=SIDE)
CAPTIONS = {"en": "a cat number {}", "zh": "第 {} 只猫"}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def captions(number):
    return {language: text.format(number) for language, text in CAPTIONS.items()}


def write_folder(root):
    for number in range(COUNT):
        place = root / "train" / "some"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(png(number))
        (place / f"{number}.json").write_text(json.dumps({"text": captions(number)}))


def write_lines(root):
    (root / "files").mkdir(parents=True)
    rows = []
    for number in range(COUNT):
        (root / "files" / f"{number}.png").write_bytes(png(number))
        rows.append({"image": f"files/{number}.png", "text": captions(number)})
    (root / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def write_parquet(root):
    root.mkdir()
    columns = {
        "image": [{"bytes": png(number)} for number in range(COUNT)],
        "text": [list(captions(number).values()) for number in range(COUNT)],
    }
    parquet.write_table(pyarrow.table(columns), root / "train-0.parquet", row_group_size=2)


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_tar(root):
    root.mkdir()
    for shard in range(2):
        with tarfile.open(root / f"train-{shard:04d}.tar", "w") as archive:
            for number in range(COUNT)[shard * 3 : shard * 3 + 3]:
                add(archive, f"a/{number}.json", json.dumps({"text": captions(number)}).encode())
                add(archive, f"a/{number}.png", png(number))
                add(archive, f"a/{number}.cls", b"3")


def data(path, **settings):
    settings = {
        "crop_fraction": 1.0,
        "validation_fraction": 0.0,
        "tokenizer": TokenizerConfig("bytes"),
        "prepare_processes": 1,
        **settings,
    }
    source = {"caption_field": "text"} | settings.pop("source", {})
    return ImageTextData(source=ImageSource(str(path), **source), **settings)


def texts(prepared, index, draws=12):
    """The captions that examples of an image have."""
    examples = prepared.examples("train", OBJECTIVE.window_spec(LENGTH))
    tokenizer, rng = prepared.tokenizer, np.random.default_rng(0)
    return {tokenizer.decode(examples.read(index, rng)["tokens"].tolist()) for _ in range(draws)}


@pytest.mark.parametrize("write", [write_folder, write_lines, write_parquet, write_tar])
def test_images_and_captions_of_every_kind_of_source(tmp_path, write):
    write(tmp_path / "pairs")
    assert not data(tmp_path / "pairs").preparation().is_finished()
    prepared = prepare(data(tmp_path / "pairs"))
    assert prepared.data.preparation().is_finished()
    assert len(prepared.train) == COUNT
    for number in range(COUNT):
        assert (prepared.train.pixels(number, 3) == pixels(number)).all()
        assert texts(prepared, number) == set(captions(number).values())
    opened = open_dataset(prepared.data)
    assert opened.fingerprint == prepared.fingerprint
    assert pickle.loads(pickle.dumps(opened.train)).captions(3) == list(captions(3).values())


@pytest.mark.parametrize("write", [write_folder, write_lines, write_tar])
def test_parquet_files_of_metadata_are_left_beside_the_images(tmp_path, write):
    root = tmp_path / "source"
    write(root)
    columns = {"url": ["https://a"] * COUNT, "caption": ["a"] * COUNT, "key": ["0"] * COUNT}
    parquet.write_table(pyarrow.table(columns), root / "00000.parquet")  # as img2dataset does
    (root / "00000_stats.json").write_text("{}")
    assert len(open_images(ImageSource(str(root), caption_field="text"))) == COUNT
    (root / "alone").mkdir()
    (root / "00000.parquet").rename(root / "alone" / "00000.parquet")
    with pytest.raises(UserError, match="has no column 'image', it has 'url', 'caption'"):
        open_images(ImageSource(str(root / "alone"), caption_field="text"))


def test_parquet_files_of_metadata_are_left_beside_folders_of_classes(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(png(0))
    parquet.write_table(pyarrow.table({"url": ["https://a"]}), tmp_path / "0.parquet")
    assert open_images(ImageSource(str(tmp_path))).classes == ("cat", "dog")


def test_lines_of_a_text_file_are_captions_and_images_without_are_left_out(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    (tmp_path / "0.txt").write_text("one\n\n two \n")
    (tmp_path / "2.txt").write_text("three")
    prepared = prepare(data(tmp_path, source={"caption_field": "txt"}))
    assert [prepared.train.captions(i) for i in range(2)] == [["one", "two"], ["three"]]
    assert "1.png has no caption" in (tmp_path / prepared.directory / SKIPPED).read_text()


def test_pairs_of_a_subfolder_for_evaluation_are_not_trained_on(tmp_path):
    for place in ("0", "some/1", "val/2", "test/3"):
        file = tmp_path / "source" / f"{place}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(int(place[-1])))
        file.with_suffix(".txt").write_text("a caption")
    source = ImageSource(str(tmp_path / "source"), caption_field="txt")
    places = [
        [found.place for found in images.read(0, len(images))]
        for images in (open_images(source), open_images(replace(source, split="validation")))
    ]
    assert places == [["0.png", "some/1.png"], ["val/2.png"]]


def test_other_captions_are_other_data(tmp_path):
    write_lines(tmp_path / "a")
    write_lines(tmp_path / "b")
    lines = (tmp_path / "b" / "metadata.jsonl").read_text().replace("cat number 4", "dog")
    (tmp_path / "b" / "metadata.jsonl").write_text(lines)
    one, other = (prepare(data(tmp_path / name)) for name in ("a", "b"))
    assert one.fingerprint != other.fingerprint


def test_a_tokenizer_is_trained_once_on_the_captions(tmp_path):
    write_lines(tmp_path / "pairs")
    config = data(tmp_path / "pairs", tokenizer=TokenizerConfig("wordpiece", vocab_size=36))
    prepared = prepare(config)
    assert prepared.vocabulary.size == 36
    assert prepare(config).tokenizer.fingerprint == prepared.tokenizer.fingerprint
    given = TokenizerConfig("bytes")
    assert prepare(data(tmp_path / "pairs", tokenizer=given)).vocabulary.size == 262


def test_captions_keep_the_whole_vocabulary_for_a_smaller_model(tmp_path):
    write_lines(tmp_path / "pairs")
    prepared = prepare(data(tmp_path / "pairs", tokenizer=TokenizerConfig("bytes")))
    assert prepared.fitted(100, -1, 100).vocabulary.size == 262


MADE = (
    ClassTexts(("zero", "one", "two"), ("the number {}", "{}"), "en"),
    ClassTexts(("null", "eins", "zwei"), ("die Zahl {}",), "de"),
)


def test_labelled_images_have_captions_in_several_languages(tmp_path):
    write_idx(tmp_path / "digits")
    config = data(
        tmp_path / "digits", channels=1, source={"caption_field": ""}, captions=MADE,
        zero_shot=(MADE[1],), validation_fraction=None,
    )  # fmt: skip
    prepared = prepare(config)
    assert texts(prepared, 1, 40) == {"the number one", "one", "die Zahl eins"}
    assert len(prepared.labelled) == len(prepared.validation) == 10
    held_out = prepared.examples("validation", OBJECTIVE.window_spec(LENGTH))
    row = held_out.read(2, np.random.default_rng(0))
    assert prepared.tokenizer.decode(row["tokens"].tolist()) == "the number two"


def test_examples_do_not_depend_on_hosts_or_a_resume(tmp_path):
    write_folder(tmp_path / "pairs")
    prepared = prepare(data(tmp_path / "pairs"))

    def batches(count, position=0, rows=range(4)):
        with TrainStream(
            prepared.examples("train", OBJECTIVE.window_spec(LENGTH)), OBJECTIVE,
            prepared.vocabulary, sequence_length=LENGTH, batch_size=4, seed=3,
            position=position, rows=rows,
        ) as stream:  # fmt: skip
            return [next(stream) for _ in range(count)]

    whole = batches(6)
    for name in whole[0]:
        for found, expected in zip(batches(3, 12), whole[3:], strict=True):
            np.testing.assert_array_equal(found[name], expected[name])
        for found, expected in zip(batches(6, 0, [1, 3]), whole, strict=True):
            np.testing.assert_array_equal(found[name], expected[name][[1, 3]])
    assert whole[0]["pixel_values"].shape == (4, 3, SIDE, SIDE)


def test_captions_begin_after_the_byte_order_mark_and_are_valid_text(tmp_path):
    for name, text in (("a", "\ufeffone\u2028dog\r\ntwo dogs\r\n".encode()), ("b", b"a d\xf6g\n")):
        (tmp_path / f"{name}.png").write_bytes(png(1))
        (tmp_path / f"{name}.txt").write_bytes(text)
    source = ImageSource(str(tmp_path), caption_field="txt")
    found = [image.captions for image in open_images(source).read(0, 2)]
    assert found == [("one\u2028dog", "two dogs"), ()]


def test_captioned_parquet_files_in_a_folder_of_another_split_are_left_out(tmp_path):
    for split in ("train", "test"):
        write_parquet(tmp_path / split)
        (tmp_path / split / "train-0.parquet").rename(tmp_path / split / "0.parquet")
    prepared = prepare(data(tmp_path))
    assert len(prepared.train) == COUNT


def test_captioned_images_below_a_split_in_upper_case_are_of_that_split(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train").rename(tmp_path / "Train")
    shutil.copytree(tmp_path / "Train", tmp_path / "Val")
    prepared = prepare(data(tmp_path, validation_fraction=None))
    assert (len(prepared.train), len(prepared.validation)) == (COUNT, COUNT)


@pytest.mark.parametrize("name", ["a\0b.png", "a\ud800b.png"], ids=["NUL", "surrogate"])
def test_an_image_whose_name_no_file_can_have_is_left_out(tmp_path, name):
    write_lines(tmp_path / "pairs")
    with (tmp_path / "pairs" / "metadata.jsonl").open("a") as file:
        file.write(f"\n{json.dumps({'image': name, 'text': 'a cat'})}\n")
    prepared = prepare(data(tmp_path / "pairs"))
    assert len(prepared.train) == COUNT
    skipped = (tmp_path / prepared.directory / SKIPPED).read_text()
    assert len(skipped.splitlines()) == 1 and "is empty" in skipped


def test_what_cannot_be_read_is_refused_with_a_remedy(tmp_path):
    write_folder(tmp_path / "pairs")
    source = ImageSource("labelled")
    with pytest.raises(UserError, match=r"either from data\.source\.caption_field or"):
        data(tmp_path / "pairs", captions=MADE)
    with pytest.raises(UserError, match=r"set data\.zero_shot_data"):
        data(tmp_path / "pairs", zero_shot=MADE)
    with pytest.raises(UserError, match="are named 'en', 'en'; give each its own name"):
        data(tmp_path / "pairs", zero_shot=MADE[:1] * 2, zero_shot_data=ImageData(source=source))
    with pytest.raises(UserError, match=r"no image file with a \.txt file beside it"):
        prepare(data(tmp_path / "pairs", source={"caption_field": "txt"}))
    with pytest.raises(UserError, match="with {} in place"):
        ClassTexts(("a",), ("no name",))
    with pytest.raises(UserError, match="have 3 class_names, but the images have 2"):
        MADE[0].named(("a", "b"))
    prepared = prepare(data(tmp_path / "pairs"))
    with pytest.raises(UserError, match="choose ImageTextContrastive"):
        prepared.examples("train", ImageSpec(SIDE))
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8bnot a tar file")
    with pytest.raises(UserError, match=r"x\.tar is damaged, or compressed"):
        prepare(data(tmp_path / "x.tar"))
    (tmp_path / "x.jsonl").write_text('{"image": "a.png"}\n')
    with pytest.raises(UserError, match=r"Line 1 of .*x\.jsonl is no record"):
        prepare(data(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    ("fields", "said"),
    [({"name": object}, "data.captions.name is"), ({"class_names": ("a", 3)}, "class_names is")],
)
def test_texts_of_another_type_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        ClassTexts(**fields)


def test_zero_shot_scores_need_held_out_images(tmp_path):
    write_idx(tmp_path / "digits")
    config = data(
        tmp_path / "digits", channels=1, source={"caption_field": ""}, captions=MADE,
        zero_shot=(MADE[1],),
    )  # fmt: skip
    with pytest.raises(UserError, match="data.zero_shot needs held-out images with classes"):
        prepare(config)


def test_the_images_of_zero_shot_scores_are_compared_and_verified(tmp_path):
    write_folder(tmp_path / "pairs")
    write_idx(tmp_path / "digits")
    source = ImageSource(str(tmp_path / "digits"))
    labelled = ImageData(source=source, store=str(tmp_path / "store"), verify=False)
    config = data(tmp_path / "pairs", zero_shot=MADE[:1], zero_shot_data=labelled)
    prepared = prepare(config)
    prepared.verify()
    file = tmp_path / "store/validation/labels"
    file.write_bytes(b"\x01" + file.read_bytes()[1:])
    with pytest.raises(UserError, match="validation/labels of the image store .* sha256"):
        prepared.verify()
    write_idx(tmp_path / "digits", count=(41, 10))
    with pytest.raises(UserError, match="digits"):
        prepare(config)


def test_a_set_is_scored_without_zero_shot(tmp_path):
    texts = (ClassTexts(("zero", "one", "two"), ("the number {}",), "en"),)
    source = ImageSource(str(write_idx(tmp_path / "idx")))
    made = ImageTextData(
        source=source, captions=texts, zero_shot=texts, tokenizer=TokenizerConfig("bytes")
    )
    of_set = made.of_evaluation_set(EvaluationSet("x", source))
    assert of_set.zero_shot == () and len(prepare(of_set).train) == 10
