"""Arrays of several sources as examples: shapes, splits, labels, and what is refused."""

from __future__ import annotations

import gzip
import pickle
from dataclasses import replace

import numpy as np
import pytest

from flax_transformers.config_json import from_json, to_json
from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.dataset import prepare
from flax_transformers.data.signals.dataset import SignalData
from flax_transformers.data.signals.generated import MovingDigits, Solids, Tones, log_mel, word
from flax_transformers.data.signals.sources import ArraySource, Digits, EmbeddedBytes
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.masked_image import MaskedImage
from flax_transformers.objectives.modalities import MaskedModalities, ModalityClassification
from flax_transformers.objectives.signals import SignalSpec
from flax_transformers.objectives.videos import MaskedVideo

SPEC = SignalSpec(28)
RNG = np.random.default_rng(0)
FEW = {"examples": 30, "held_out": 10}


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """A folder of MNIST's files with 12 images for training and 5 for evaluation."""
    folder = tmp_path_factory.mktemp("mnist")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("t10k", 5)):
        images = rng.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            with gzip.open(folder / f"{split}-{kind}-ubyte.gz", "wb") as file:
                file.write(header + array.tobytes())
    return str(folder)


def sources(mnist):
    return (
        Digits(name="image", path=mnist),
        MovingDigits(name="video", path=mnist, **FEW),
        Tones(name="audio", **FEW),
        Solids(name="depth", view="depth", **FEW),
        Solids(name="points", **FEW),
        EmbeddedBytes(name="text"),
    )


@pytest.mark.slow
def test_every_source_gives_the_arrays_that_it_states_and_always_the_same(mnist):
    for source in sources(mnist):
        for split in ("train", "validation"):
            items, again = source.opened(split), source.opened(split)
            array = items[3]
            assert (array.shape, array.dtype) == (source.shape, np.dtype(source.dtype))
            np.testing.assert_array_equal(array, again[3])
            assert np.any(array != items[4])
            assert (items.labels is None) == (source.label_names == ())


def test_training_repeats_the_shorter_sources_and_evaluation_ends_with_the_shortest(mnist):
    data = SignalData(sources=sources(mnist)[:2])
    dataset = data.load()
    train, held_out = (dataset.examples(split, SPEC) for split in ("train", "validation"))
    assert (len(train), len(held_out)) == (30, 5)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(train.read(13, rng)["image"], train.read(1, rng)["image"])
    assert "label" not in train.read(0, rng)  # two sources have labels
    assert pickle.loads(pickle.dumps(train)).read(13, rng)["image"].shape == (28, 28, 1)


def test_one_source_gives_its_labels(mnist):
    data = SignalData(sources=(MovingDigits(name="video", path=mnist, **FEW),))
    dataset = data.load()
    examples = dataset.examples("train", SPEC)
    found = [int(examples.read(i, np.random.default_rng(0))["label"]) for i in range(14)]
    assert found == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 0, 1]
    assert examples.classes.tolist()[:3] == [0, 1, 2] and len(dataset.label_names) == 10
    dummy = data.dummy_example(SPEC, 0)
    assert dummy["video"].shape == (8, 28, 28, 1) and dummy["label"] == 0
    assert from_json(to_json(data)) == data


def test_a_digit_moves_within_the_picture_and_keeps_its_shape(mnist):
    video = MovingDigits(name="video", path=mnist, frames=16, **FEW).opened("train")[5][..., 0]
    places = {(np.argmax(frame.any(1)), np.argmax(frame.any(0))) for frame in video}
    assert len(places) > 8
    assert len({int(frame.sum()) for frame in video}) == 1


def test_a_tone_is_loudest_in_the_mel_band_of_its_frequency():
    time = np.arange(4096) / 8000
    quiet, high = (log_mel(np.sin(2 * np.pi * f * time), 32).mean(0).argmax() for f in (400, 2400))
    # 509 and 1678 mels, where the centres of the bands are 65 apart up to 2146.
    assert (quiet, high) == (7, 25)
    wave = word("ai", 4096, np.random.default_rng(0))
    assert wave.shape == (4096,) and np.abs(wave).max() > 0.1


def test_two_views_of_a_solid_are_aligned():
    points = Solids(name="points", points=4000, **FEW).opened("train")[1]
    depth = Solids(name="depth", view="depth", **FEW).opened("train")[1][..., 0]
    assert np.linalg.norm(points, axis=1).max() == pytest.approx(1, abs=1e-6)
    pixels = ((points[:, :2] + 1) / 2 * 28).astype(int).clip(0, 27)
    assert (depth[pixels[:, 0], pixels[:, 1]] > 0).mean() > 0.95


def test_arrays_are_read_from_files_with_their_labels(tmp_path):
    arrays = np.random.default_rng(0).integers(0, 256, (6, 4, 8, 8, 3), np.uint8)
    np.save(tmp_path / "train.npy", arrays)
    np.save(tmp_path / "train_labels.npy", np.arange(6) % 2)
    plain = ArraySource(name="video", path=str(tmp_path), array_shape=(4, 8, 8, 3))
    source = ArraySource(**vars(plain) | {"classes": ("cat", "dog")})
    data = SignalData(sources=(source,))
    example = data.load().examples("train", SPEC).read(3, np.random.default_rng(0))
    np.testing.assert_array_equal(example["video"], arrays[3])
    assert example["label"] == 1
    assert data.load().examples("validation", SPEC) is None
    with pytest.raises(UserError, match=r"\[4, 8, 8, 3\] .* says \[2, 8, 8, 3\] and uint8"):
        ArraySource(**vars(plain) | {"array_shape": (2, 8, 8, 3)}).opened("train")
    with pytest.raises(UserError, match="one integer from 0 to 0"):
        ArraySource(**vars(plain) | {"classes": ("cat",)}).opened("train")
    before = data.load().fingerprint
    np.save(tmp_path / "train_labels.npy", (np.arange(6) + 1) % 2)
    relabelled = data.load().fingerprint
    np.save(tmp_path / "train.npy", arrays[::-1])
    assert len({before, relabelled, data.load().fingerprint}) == 3


def test_a_change_of_any_array_is_noticed_and_earlier_fingerprints_are_known(tmp_path):
    arrays = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    np.save(tmp_path / "train.npy", arrays)
    source = ArraySource(name="points", path=str(tmp_path), array_shape=(3, 2))
    made = SignalData(sources=(source,)).load()
    # Noted by a run of before the whole content was hashed.
    assert made.known_as == ("6c3433643ffb35acfb71eeb09b72feaff71612054160586977e32c838b138179",)
    assert SignalData(sources=(source,)).load().fingerprint == made.fingerprint
    arrays[1, 0, 0] += 1
    np.save(tmp_path / "train.npy", arrays)
    assert SignalData(sources=(source,)).load().fingerprint != made.fingerprint


def scored(data, source):
    """The arrays of an evaluation set that are scored."""
    own = prepare(data.of_evaluation_set(EvaluationSet("x", source)))
    examples = prepare(data).scored_on(own).examples("validation", SPEC)
    return [examples.read(i, RNG)[source.name] for i in range(len(examples))]


def test_an_evaluation_set_scores_what_its_source_holds_out(tmp_path):
    tones = Tones(name="audio", **FEW)
    data, held_out = SignalData(sources=(tones,)), tones.opened("validation")
    found = scored(data, tones)  # as in training, which no set may be scored on
    np.testing.assert_array_equal(found, [held_out[i] for i in range(len(held_out))])
    shape = {"array_shape": tones.shape, "array_dtype": tones.dtype, "classes": tones.label_names}
    files = ArraySource(name="audio", path=str(tmp_path), **shape)
    with pytest.raises(UserError, match="There is no file .*train.npy"):
        scored(data, files)
    for split in ("train", "validation"):
        np.save(tmp_path / f"{split}.npy", np.array(found)[: 3 if split == "train" else 2])
        np.save(tmp_path / f"{split}_labels.npy", np.arange(3 if split == "train" else 2))
        assert len(scored(data, files)) == (3 if split == "train" else 2)
    (tmp_path / "train.npy").unlink()
    np.testing.assert_array_equal(scored(data, files), found[:2])


@pytest.mark.parametrize(
    ("objective", "sources", "says"),
    [
        (MaskedVideo(), ("video",), "'x' is named 'other', but .* set name='video' of that source"),
        (ModalityClassification(modality="audio"), ("audio", "video"), "needs 'audio'"),
        (MaskedModalities(modalities=("a", "b")), ("a", "b"), "'x' has one source, but .* a, b in"),
    ],
)
def test_an_evaluation_set_without_what_the_objective_needs_is_refused(objective, sources, says):
    data, spec = (
        SignalData(sources=tuple(Tones(name=name) for name in sources)),
        objective.window_spec(28),
    )
    data.check_objective("O", spec)
    one, other = (
        data.of_evaluation_set(EvaluationSet("x", Tones(name=name)))
        for name in (sources[0], "other")
    )
    with pytest.raises(UserError, match=says):
        other.check_objective("O", spec)
    if len(spec.names) == 1:
        one.check_objective("O", spec)
    other.check_objective("of the user's own", SPEC)


def test_generated_arrays_are_kept_up_to_a_number_of_bytes():
    for source in (
        Tones(name="audio", frames=65_536, mels=128, **FEW),  # 32 MiB each
        Solids(name="points", points=65_536, **FEW),  # 768 KiB
        Solids(name="depth", view="depth", size=4096, **FEW),  # 64 MiB
    ):
        most = source.opened("train").read.cache_info().maxsize
        array = np.prod(source.shape) * 4
        assert (1 << 26) - array < most * array <= 1 << 26
    small = Tones(name="audio", **FEW).opened("train")
    assert small[3] is small[3]


@pytest.mark.parametrize("name", ["mask_keys", "weights", "label", "a/b", "3d", ""])
def test_names_of_other_arrays_and_parts_of_paths_are_refused(name):
    with pytest.raises(UserError, match=f"data.sources.name is '{name}'; it must have only"):
        EmbeddedBytes(name=name)


def test_labels_are_of_one_source(mnist):
    one, other = sources(mnist)[:2]
    objective = ModalityClassification(modality="video")
    for data in ((EmbeddedBytes(name="video"),), (one, other)):
        example = SignalData(sources=data).load().examples("train", SPEC)
        with pytest.raises(UserError, match="no source or more than one source has labels"):
            objective.prepare(example.read(0, RNG), RNG, Vocabulary(size=1, pad_id=0), 28)


def test_what_cannot_be_read_is_refused(tmp_path, mnist):
    video = ArraySource(name="video", path=str(tmp_path), array_shape=(4, 8, 8, 3))
    with pytest.raises(UserError, match=r"There is no file .*train\.npy"):
        SignalData(sources=(video,)).load()
    for content in (b"nothing", b""):
        (tmp_path / "train.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"train\.npy is no NumPy file"):
            SignalData(sources=(video,)).load()
    np.save(tmp_path / "train.npy", np.uint8(1))
    with pytest.raises(UserError, match="with an axis of examples"):
        video.opened("train")
    np.save(tmp_path / "train.npy", np.zeros((0, 4, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="source 'video' has no training arrays"):
        SignalData(sources=(EmbeddedBytes(name="text"), video)).load()
    with pytest.raises(UserError, match="data.sources.array_dtype is 'flot32'; it must be 'bool'"):
        replace(video, array_dtype="flot32")
    with pytest.raises(UserError, match="a name of its own"):
        SignalData(sources=(video, video))
    data, images = SignalData(sources=(video,)), MaskedImage().window_spec(8)
    with pytest.raises(UserError, match="does not learn from a SignalData"):
        data.check_objective("MaskedImage", images)
