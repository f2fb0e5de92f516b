"""Images from every kind of source, and equal examples on every host."""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
import pickle

import numpy as np
import PIL.Image
import pyarrow
import pytest
from pyarrow import parquet

from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.dataset import open_dataset, prepare
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource, split_of_path
from flax_transformers.data.images.sources import open_images, own_held_out
from flax_transformers.data.images.store import SKIPPED
from flax_transformers.data.pipeline.loader import TrainStream, ordered_batches
from flax_transformers.errors import UserError
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.images import ImageSpec
from flax_transformers.objectives.masked_image import MaskedImage
from flax_transformers.objectives.masked_lm import MaskedLM

SIDE = 8


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pixels(number, side=SIDE):
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)


def png(number):
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels(number)).save(stream, "PNG")
    return stream.getvalue()


def write_folder(root, splits=("train", "val"), classes=("cat", "dog"), count=6):
    for number, split in enumerate(splits):
        for label, name in enumerate(classes):
            for i in range(count):
                path = root / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(png((number, label, i)))
    return root


def write_idx(root, count=(40, 10), side=SIDE):
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for split, images in zip(("train", "t10k"), count, strict=True):
        array = rng.integers(0, 256, (images, side, side), np.uint8)
        labels = np.arange(images, dtype=np.uint8) % 3
        for kind, values in (("images", array), ("labels", labels)):
            header = bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes()
            path = root / f"{split}-{kind}-idx{values.ndim}-ubyte.gz"
            path.write_bytes(gzip.compress(header + values.tobytes(), 1))
    return root


def data(path, **settings):
    settings = {"crop_fraction": 1.0, **settings}
    source = ImageSource(str(path), **settings.pop("source", {}))
    return ImageData(source=source, **settings)


def read_all(prepared, split="train"):
    """(label, pixels) of every image as evaluation sees it."""
    images = prepared.train if split == "train" else prepared.validation
    return [
        (int(images.labels[i]), images.pixels(i, prepared.data.channels))
        for i in range(len(images))
    ]


def test_a_folder_of_classes_is_read_in_place(tmp_path):
    prepared = prepare(data(write_folder(tmp_path / "pets")))
    assert prepared.label_names == ("cat", "dog")
    assert prepared.vocabulary.size == 2
    found = read_all(prepared)
    assert [label for label, _ in found] == [0] * 6 + [1] * 6
    assert all((image == pixels((0, n // 6, n % 6))).all() for n, (_, image) in enumerate(found))
    held_out = read_all(prepared, "validation")
    assert (held_out[7][1] == pixels((1, 1, 1))).all()
    assert open_dataset(prepared.data).fingerprint == prepared.fingerprint


def test_a_folder_without_splits_or_classes_holds_out_a_share_by_content(tmp_path):
    root = write_folder(tmp_path, splits=(".",), classes=("all",), count=40) / "all"
    (root / "copy.png").write_bytes((root / "0.png").read_bytes())
    prepared = prepare(data(root, validation_fraction=0.3))
    assert prepared.label_names == ("all",)
    sides = [
        {image.tobytes() for _, image in read_all(prepared, s)} for s in ("train", "validation")
    ]
    assert len(prepared.train) + len(prepared.validation) == 41
    assert not sides[0] & sides[1]  # equal images stay on one side
    assert 4 < len(prepared.validation) < 20


def test_images_of_a_subfolder_for_evaluation_are_not_trained_on(tmp_path):
    write_folder(tmp_path / "flat", splits=(".",), classes=("val",))
    for i in range(3):
        (tmp_path / "flat" / f"{i}.png").write_bytes(png(i))
    write_folder(tmp_path / "classes", splits=(".", "val"))
    for name, count, classes in (
        ("flat", (3, 6), ("flat",)),
        ("classes", (12, 12), ("cat", "dog")),
    ):
        prepared = prepare(data(tmp_path / name))
        assert prepared.label_names == classes
        assert (len(prepared.train), len(prepared.validation)) == count


@pytest.mark.parametrize(
    "names", [("Training", "Testing"), ("Train", "Val"), ("train", "Test"), ("TRAIN", "VALID")]
)
def test_splits_are_known_in_upper_case_too(tmp_path, names):
    prepared = prepare(data(write_folder(tmp_path / "pets", names)))
    assert prepared.label_names == ("cat", "dog")
    assert (len(prepared.train), len(prepared.validation)) == (12, 12)
    assert (read_all(prepared, "validation")[7][1] == pixels((1, 1, 1))).all()
    for name in names:  # also as the folder is written
        assert len(open_images(ImageSource(str(tmp_path / "pets"), split=name))) == 12


def test_one_file_is_read_whatever_its_name(tmp_path):
    for name in ("Test-set.parquet", "val.parquet"):
        rows = {"image": [{"bytes": png((1, 1, n))} for n in range(3)], "label": [0, 0, 0]}
        parquet.write_table(pyarrow.table(rows), tmp_path / name)
        assert len(open_images(ImageSource(str(tmp_path / name)))) == 3


def test_a_class_called_test_is_one_without_a_folder_for_training(tmp_path):
    write_folder(tmp_path / "pets", splits=(".",), classes=("Test", "cat"))
    prepared = prepare(data(tmp_path / "pets", validation_fraction=0.0))
    assert prepared.label_names == ("Test", "cat")
    assert own_held_out(ImageSource(str(tmp_path / "pets"))) is None


@pytest.mark.parametrize("place", ["Test/0.parquet", "Test-0.parquet", "data/TEST/0.parquet"])
def test_files_are_named_by_splits_in_upper_case_too(tmp_path, place):
    assert split_of_path(tmp_path, tmp_path / place) == "test"


def test_of_an_evaluation_set_with_splits_the_held_out_one_is_scored(tmp_path):
    roots = write_idx(tmp_path / "idx"), write_folder(tmp_path / "pets", ("train", "val", "test"))
    for root, split, count in zip(roots, ("test", "validation"), (10, 12), strict=True):
        source = ImageSource(str(root))
        made = data(root, store=str(tmp_path / "store"))
        of_set = made.of_evaluation_set(EvaluationSet("x", source))
        assert (of_set.source.split, of_set.store) == (split, f"{tmp_path}/store/sets/x.{split}")
        assert len(prepare(of_set).train) == count
        if split == "test":  # copied images: the store is enough
            root.rename(tmp_path / "gone")
            assert made.of_evaluation_set(EvaluationSet("x", source)) == of_set
            (tmp_path / "gone").rename(root)
        chosen = made.of_evaluation_set(
            EvaluationSet("x", dataclasses.replace(source, split="test"))
        )
        assert chosen.source.split == "test"
    whole = EvaluationSet("x", ImageSource(str(write_folder(tmp_path / "whole", splits=(".",)))))
    assert made.of_evaluation_set(whole).source == whole.source


def test_a_class_called_train_is_not_taken_for_a_split(tmp_path):
    write_folder(tmp_path, splits=(".",), classes=("bus", "train"))
    with pytest.raises(UserError, match="train/ and in bus/, .* move all classes into a folder"):
        prepare(data(tmp_path))
    write_folder(tmp_path / "moved", splits=("train",), classes=("bus", "train"))
    assert prepare(data(tmp_path / "moved", validation_fraction=0.0)).label_names == (
        "bus",
        "train",
    )


def test_a_folder_beside_two_splits_is_neither_split_nor_class(tmp_path):
    for folder in ("train", "val", "masks"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes(png(1))
    prepared = prepare(data(tmp_path))
    assert (len(prepared.train), len(prepared.validation)) == (1, 1)


def test_the_files_of_mnist_need_no_decoding(tmp_path):
    prepared = prepare(data(write_idx(tmp_path), channels=1))
    assert (len(prepared.train), len(prepared.validation)) == (40, 10)
    rng = np.random.default_rng(0)
    expected = rng.integers(0, 256, (40, SIDE, SIDE), np.uint8)
    for number, (label, image) in enumerate(read_all(prepared)):
        assert label == number % 3 and (image[:, :, 0] == expected[number]).all()
    assert prepare(data(tmp_path)).train.pixels(3, 3).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("named", [True, False])
def test_parquet_files_hold_images_as_hugging_face_stores_them(tmp_path, named):
    noted = {"info": {"features": {"label": {"names": ["no", "yes", "perhaps"]}}}}
    for split, count in (("train", 9), ("test", 4)):
        rows = {
            "image": [{"bytes": png((split == "test", i)), "path": None} for i in range(count)],
            "label": [i % 3 for i in range(count)] if named else ["b", "a", "c"] * 3,
        }
        rows["label"] = rows["label"][:count]
        table = pyarrow.table(rows)
        if named:
            table = table.replace_schema_metadata({"huggingface": json.dumps(noted)})
        parquet.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet", row_group_size=4)
    prepared = prepare(data(tmp_path))
    labels = [label for label, _ in read_all(prepared)]
    assert prepared.label_names == (("no", "yes", "perhaps") if named else ("a", "b", "c"))
    assert labels == ([0, 1, 2] * 3 if named else [1, 0, 2] * 3)
    assert all((image == pixels((0, i))).all() for i, (_, image) in enumerate(read_all(prepared)))
    assert len(prepared.validation) == 4


@pytest.mark.parametrize("place", ["{}/0000.parquet", "data/{}/0000.parquet"])
def test_parquet_files_in_folders_of_splits_are_of_that_split(tmp_path, place):
    for split, label in (("train", 0), ("test", 1), ("extra", 2)):
        file = tmp_path / place.format(split)
        file.parent.mkdir(parents=True)
        table = pyarrow.table({"image": [png(label)] * 4, "label": [label] * 4})
        parquet.write_table(table, file)
    for split, label in (("train", 0), ("test", 1), ("extra", 2)):
        images = open_images(ImageSource(str(tmp_path), split=split))
        assert {found.label for found in images.read(0, len(images))} == {label}
        assert len(images) == 4
    assert own_held_out(ImageSource(str(tmp_path))) == "test"
    with pytest.raises(UserError, match="no parquet files of the split 'validation'"):
        open_images(ImageSource(str(tmp_path), split="validation"))


@pytest.mark.slow
def test_what_tfds_prepared_is_read_without_tensorflow(tmp_path):
    import tensorflow_datasets as tfds

    class Shapes(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3)),
                "label": tfds.features.ClassLabel(names=["round", "square"]),
            }
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples(6), "test": self._generate_examples(3)}

        def _generate_examples(self, count):
            for i in range(count):
                yield i, {"image": io.BytesIO(png((count, i))), "label": i % 2}

    builder = Shapes(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    prepared = prepare(data(f"tfds:{builder.data_dir}"))
    assert prepared.label_names == ("round", "square")
    rows = builder.as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    for number, (label, image) in enumerate(read_all(prepared)):
        assert label == rows[number]["label"]
        assert (image == np.asarray(PIL.Image.open(io.BytesIO(rows[number]["image"])))).all()
    assert len(prepared.validation) == 3


def test_images_that_cannot_be_used_are_left_out_counted_and_named(tmp_path, capsys):
    root = write_folder(tmp_path / "pets")
    whole = png(0)
    for name, content in (("empty", b""), ("text", b"hello"), ("short", whole[:-30])):
        (root / "train/dog" / f"{name}.png").write_bytes(content)
    (root / "train/dog/.hidden.png").write_bytes(whole)
    (root / "train/dog/notes.txt").write_text("no image")
    prepared = prepare(data(root))
    assert len(prepared.train) == 12
    assert "left out: 3" in capsys.readouterr().err
    named = (tmp_path / prepared.directory / SKIPPED).read_text().splitlines()
    assert [line.split()[0] for line in named] == [
        "train/dog/empty.png",
        "train/dog/short.png",
        "train/dog/text.png",
    ]
    assert named[0].endswith("is empty")


@pytest.mark.slow
@pytest.mark.multi_process
def test_the_store_does_not_depend_on_the_number_of_processes(tmp_path):
    root = write_folder(tmp_path / "pets", count=30)
    one, two = (
        prepare(dataclasses.replace(data(root), prepare_processes=n), tmp_path / str(n))
        for n in (1, 2)
    )
    assert one.fingerprint == two.fingerprint
    for name in ("train/labels", "train/items", "train/ends", "validation/items"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def test_an_image_that_goes_missing_later_stops_with_a_sentence(tmp_path):
    prepared = prepare(data(write_folder(tmp_path / "pets")))
    (tmp_path / "pets/train/cat/2.png").unlink()
    with pytest.raises(UserError, match="Image train/cat/2.png of .* is no longer"):
        prepared.train.pixels(2, 3)


def _no_images(root):
    (root / "train/a").mkdir(parents=True)


def _unknown_class(root):
    write_folder(root)
    write_folder(root, splits=("val",), classes=("bird",))


def _flat_validation(root):
    write_folder(root, splits=("train",))
    (root / "val").mkdir()
    (root / "val/0.png").write_bytes(png(0))


def _idx_cut_short(root):
    write_idx(root)
    path = root / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))


def _gzip_cut_short(root):
    write_idx(root)
    path = root / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-20])


def _labels_missing(root):
    write_idx(root)
    (root / "train-labels-idx1-ubyte.gz").unlink()


def _fewer_labels(root):
    write_idx(root)
    (root / "t10k-labels-idx1-ubyte.gz").rename(root / "train-labels-idx1-ubyte.gz")


def _parquet_cut_short(root):
    parquet.write_table(pyarrow.table({"image": [png(0)], "label": [0]}), root / "a.parquet")
    (root / "a.parquet").write_bytes((root / "a.parquet").read_bytes()[:-50])


def _other_columns(root):
    parquet.write_table(pyarrow.table({"picture": [png(0)]}), root / "a.parquet")


def _all_unreadable(root):
    parquet.write_table(pyarrow.table({"image": [b"x"], "label": [0]}), root / "a.parquet")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (_no_images, "has neither image files"),
        (_unknown_class, "class 'bird' that the training images do not have"),
        (_flat_validation, "has no subfolder for each class"),
        (_idx_cut_short, "is not a complete idx file"),
        (_gzip_cut_short, "cut short or damaged"),
        (_labels_missing, "has no labels for the split 'train'"),
        (_fewer_labels, "holds 40 images and .* 10 labels"),
        (_parquet_cut_short, "cut short or damaged"),
        (_other_columns, "has no column 'image', it has 'picture'"),
        (_all_unreadable, "No image of .* is left for train"),
    ],
)
def test_sources_that_cannot_be_used_say_what_is_wrong(tmp_path, make, says):
    root = tmp_path / "source"
    root.mkdir()
    make(root)
    with pytest.raises(UserError, match=says):
        prepare(data(root))


@pytest.mark.slow
def test_readers_of_garbage_raise_nothing_but_user_errors(tmp_path):
    rng = np.random.default_rng(0)
    write_idx(tmp_path / "idx", count=(3, 2))
    table = pyarrow.table({"image": [png(i) for i in range(3)], "label": [0, 1, 0]})
    (tmp_path / "parquet").mkdir()
    parquet.write_table(table, tmp_path / "parquet/a.parquet")
    targets = [tmp_path / "idx/train-images-idx3-ubyte.gz", tmp_path / "parquet/a.parquet"]
    whole = [target.read_bytes() for target in targets]
    refused = 0
    for case in range(100):
        target, raw = targets[case % 2], bytearray(whole[case % 2])
        raw = raw[: rng.integers(len(raw))] if case % 5 == 0 else raw
        for _ in range(rng.integers(1, 8)):
            raw[rng.integers(len(raw))] = rng.integers(256)
        target.write_bytes(raw)
        try:
            source = data(target.parent, validation_fraction=0.0)
            prepare(dataclasses.replace(source, prepare_processes=1), tmp_path / f"store{case}")
        except UserError:
            refused += 1
    assert 10 < refused < 100


def test_a_store_of_other_images_is_refused(tmp_path):
    prepare(data(write_idx(tmp_path / "one"), store=str(tmp_path / "store")))
    with pytest.raises(UserError, match="the same files have changed since"):
        prepare(data(write_idx(tmp_path / "two", count=(41, 10)), store=str(tmp_path / "store")))
    with pytest.raises(UserError, match="was made with validation_fraction=None; .* for .*=0.5"):
        prepare(data(tmp_path / "one", store=str(tmp_path / "store"), validation_fraction=0.5))
    (tmp_path / "store/manifest.json").write_text("{}")
    with pytest.raises(UserError, match="image store in .* has format None, .* reads format 3"):
        prepare(data(tmp_path / "one", store=str(tmp_path / "store")))
    with pytest.raises(UserError, match="There is no finished image store"):
        open_dataset(data(tmp_path / "one", store=str(tmp_path / "nothing")))


def test_images_are_not_given_to_objectives_for_text(tmp_path):
    prepared = prepare(data(write_idx(tmp_path)))
    with pytest.raises(UserError, match="learns from text, but data are images"):
        prepared.examples("train", MaskedLM().window_spec(64))


AUGMENTED = Augmentation(crop="resized", flip=0.5, policy="rand_augment", erase=0.5)
MIXED = ImageClassification(mixup=0.8, cutmix=1.0, mean=(0.5,), std=(0.5,))


def stream(prepared, objective, **settings):
    examples = prepared.examples("train", objective.window_spec(SIDE))
    chosen = {"sequence_length": SIDE, "batch_size": 8, "seed": 3, **settings}
    return TrainStream(examples, objective, prepared.vocabulary, **chosen)


def batches(prepared, objective, count=4, **settings):
    with stream(prepared, objective, **settings) as batches:
        return [next(batches) for _ in range(count)]


def assert_equal(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        assert all((one[name] == other[name]).all() for name in one)


@pytest.mark.parametrize("objective", [MIXED, MaskedImage()], ids=["mixed", "masked"])
def test_rows_are_the_same_for_any_hosts_workers_and_after_a_resume(tmp_path, objective):
    prepared = prepare(data(write_idx(tmp_path), channels=1, augmentation=AUGMENTED))
    whole = batches(prepared, objective)
    for hosts in (2, 4):
        parts = [
            batches(prepared, objective, rows=np.arange(8)[host * 8 // hosts :][: 8 // hosts])
            for host in range(hosts)
        ]
        joined = [
            {name: np.concatenate([p[name] for p in part]) for name in part[0]}
            for part in zip(*parts, strict=True)
        ]
        assert_equal(joined, whole)
    assert_equal(batches(prepared, objective, 2, position=16), whole[2:])


@pytest.mark.slow
@pytest.mark.multi_process
def test_worker_processes_make_the_same_rows(tmp_path):
    prepared = prepare(data(write_folder(tmp_path / "pets"), augmentation=AUGMENTED))
    objective = ImageClassification(mixup=0.8)
    assert_equal(batches(prepared, objective, workers=1), batches(prepared, objective))


def test_training_is_augmented_and_mixed_and_evaluation_is_not(tmp_path):
    prepared = prepare(data(write_idx(tmp_path), channels=1, augmentation=AUGMENTED))
    train = batches(prepared, MIXED, 1)[0]
    assert (train["label_weights"][:, 1] > 0).any()
    examples = prepared.examples("validation", MIXED.window_spec(SIDE))
    found = list(
        ordered_batches(
            examples, MIXED, prepared.vocabulary, sequence_length=SIDE, batch_size=4, seed=0
        )
    )
    for number in range(10):
        batch, row = found[number // 4], number % 4
        assert (
            batch["pixel_values"][row, 0] == prepared.validation.pixels(number, 1)[:, :, 0]
        ).all()
        assert batch["labels"][row, 0] == number % 3
        assert batch["label_weights"][row].tolist() == [1.0, 0.0]
    assert found[-1]["label_weights"][2:].sum() == 0  # rows that fill the batch up


def test_a_store_is_small_when_pickled_for_a_worker(tmp_path):
    prepared = prepare(data(write_idx(tmp_path, count=(3000, 10))))
    examples = prepared.examples("train", ImageSpec(SIDE))
    examples.read(0, np.random.default_rng(0))
    sent = pickle.dumps(examples)
    assert len(sent) < 5_000
    again = pickle.loads(sent).read(7, np.random.default_rng(1))
    assert (again["image"] == examples.read(7, np.random.default_rng(1))["image"]).all()


def test_a_store_may_be_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_folder(tmp_path / "images")
    made = prepare(data("~/images", store="~/store"))
    assert made.directory == str(tmp_path / "store")


def write_named(path, labels):
    columns = {"image": [{"bytes": png(n)} for n in range(len(labels))], "label": labels}
    parquet.write_table(pyarrow.table(columns), path)


def test_held_out_images_of_parquet_files_may_lack_a_class(tmp_path):
    write_named(tmp_path / "train-00000-of-00001.parquet", ["a", "b", "c"] * 2)
    write_named(tmp_path / "validation-00000-of-00001.parquet", ["c", "a"])
    made = prepare(data(tmp_path, store=str(tmp_path / "store")))
    assert made.label_names == ("a", "b", "c")
    assert made.validation.labels.tolist() == [2, 0]


def test_held_out_images_of_parquet_files_have_no_other_class(tmp_path):
    write_named(tmp_path / "train-00000-of-00001.parquet", ["a", "b"])
    write_named(tmp_path / "validation-00000-of-00001.parquet", ["a", "d"])
    with pytest.raises(UserError, match="have a class 'd' that the training images do not have"):
        prepare(data(tmp_path, store=str(tmp_path / "store")))
