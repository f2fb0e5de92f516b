"""Patches, groups, positions, masks and errors of the modalities, and the model around them."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.families.multimodal_mae import (
    CLASSIFIER,
    ByteModality,
    GridModality,
    MultimodalMaeConfig,
    PointModality,
    byte_error,
    chamfer_distance,
    cut_grid,
    group_points,
    sincos_positions,
    squared_error,
)
from flax_transformers.huggingface.family import build_model
from flax_transformers.ranges import OutOfRange
from tests.huggingface.tensors import drawn_parameters, parameter_shapes

VIDEO = GridModality(name="video", size=(4, 8, 8), patch=(2, 4, 4), tubes=True, mean=2.0, std=4.0)
POINTS = PointModality(name="points", points=40, groups=6, group_size=5)
CONFIG = MultimodalMaeConfig(
    hidden_size=16,
    num_layers=1,
    num_heads=2,
    intermediate_size=16,
    init_std=0.2,
    modalities=(VIDEO, POINTS, ByteModality(name="text", length=10)),
    decoder_hidden_size=8,
    decoder_layers=1,
    decoder_heads=2,
    decoder_intermediate_size=8,
    num_labels=3,
)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def pretrained():
    model = build_model(CONFIG)
    return model, drawn_parameters(model, parameter_shapes(model))


def test_patches_are_in_order_of_the_axes_and_hold_the_channels_last():
    videos = RNG.standard_normal((2, 4, 8, 8, 1)).astype(np.float32)
    patches, centres = cut_grid(VIDEO, videos)
    assert patches.shape == (2, 8, 32) and centres is None
    expected = (videos[1, 2:4, 4:8, 0:4].reshape(-1) - 2) / 4
    np.testing.assert_allclose(patches[1, 4 + 2], expected, rtol=1e-6)


def test_groups_of_points_are_the_neighbours_of_centres_that_lie_far_apart():
    points = RNG.standard_normal((2, 40, 3)).astype(np.float32)
    groups, centres = map(np.asarray, jax.jit(lambda p: group_points(POINTS, p))(points))
    first = np.square(points[1] - points[1].mean(0)).sum(1).argmax()
    chosen = [first]
    for _ in range(5):
        apart = np.square(points[1][:, None] - points[1][chosen][None]).sum(2).min(1)
        chosen.append(apart.argmax())
    np.testing.assert_array_equal(centres[1], points[1][chosen])
    near = np.square(points[1] - centres[1, 3]).sum(1).argsort()[:5]
    found = groups[1, 3].reshape(5, 3)
    np.testing.assert_allclose(found, points[1][near] - centres[1, 3], atol=1e-6)


def test_errors_are_squares_cross_entropies_and_distances_between_sets():
    one, other = RNG.standard_normal((2, 1, 6, 15)).astype(np.float32)
    squares = squared_error(replace(VIDEO, norm_pix_loss=True), one, other)
    normed = (other - other.mean(-1, keepdims=True)) / other.std(-1, ddof=1, keepdims=True)
    np.testing.assert_allclose(squares, ((one - normed) ** 2).mean(-1), rtol=1e-4)
    a, b = one[0, 2].reshape(5, 3), other[0, 2].reshape(5, 3)
    apart = ((a[:, None] - b[None]) ** 2).sum(-1)
    expected = apart.min(0).mean() + apart.min(1).mean()
    assert chamfer_distance(POINTS, one, other)[0, 2] == pytest.approx(expected, rel=1e-5)
    shuffled = other.reshape(1, 6, 5, 3)[:, :, ::-1].reshape(1, 6, 15)
    assert np.all(chamfer_distance(POINTS, other, shuffled) == 0)
    text = CONFIG.modality("text")
    logits, target = np.zeros((1, 1, 256), np.float32), np.eye(256, dtype=np.float32)[None, 65:66]
    assert byte_error(text, logits, target)[0, 0] == pytest.approx(np.log(256), rel=1e-6)


def test_positions_differ_in_every_place():
    table = sincos_positions((2, 3, 4), 16)
    assert table.shape == (24, 16)
    assert len({row.tobytes() for row in table}) == 24
    np.testing.assert_allclose(table[23, [0, 2, 4]], np.sin([1, 2, 3]), rtol=1e-6)


@pytest.mark.slow
def test_the_tokens_with_most_noise_are_masked_and_tubes_as_a_whole(pretrained):
    model, params = pretrained

    @jax.jit
    def run(values, noise):
        return model.apply(
            {"params": params}, values, noise, modality="video", method="masked_errors"
        )

    noise = np.array([[0.4, 0.1, 0.3, 0.2, 9, 9, 9, 9]] * 2, np.float32)
    values = RNG.standard_normal((2, 4, 8, 8, 1)).astype(np.float32)
    errors, mask = run(values, noise)
    np.testing.assert_array_equal(mask, [[1, 0, 1, 1] * 2] * 2)
    assert errors.shape == (2, 8)
    # What is masked is not seen, and what is visible is.
    hidden, visible = values.copy(), values.copy()
    hidden[:, :, :4, :4] += 1  # the first tube
    visible[:, :, :4, 4:] += 1  # the second
    others = [2, 3, 6, 7]
    np.testing.assert_allclose(run(hidden, noise)[0][:, others], errors[:, others], rtol=1e-6)
    changed = run(visible, noise)[0]
    assert np.abs(changed[:, others] - errors[:, others]).min() > 0


def test_the_trunk_is_shared_and_a_classifier_has_it_without_the_decoders(pretrained):
    _, params = pretrained
    classifier = build_model(replace(CONFIG, architecture=CLASSIFIER))
    shapes = jax.eval_shape(
        lambda: classifier.init(jax.random.key(0), **classifier.example_inputs())["params"]
    )
    shared = {"stack", "final_norm", "patcher_video", "patcher_points", "patcher_text"}
    assert shapes.keys() == shared | {"classification_head"}
    assert params.keys() == shared | {"decoder_video", "decoder_points", "decoder_text"}


def test_flops_count_visible_tokens_in_the_trunk_and_all_in_a_decoder():
    groups = {one.path: one for one in CONFIG.row_flops(0, ("video", "points", "text"))}
    assert [m.visible for m in CONFIG.modalities] == [2, 2, 7]
    assert groups["stack"].tokens == 2 + 2 + 7
    assert (groups["decoder_text/"].tokens, groups["decoder_text/embed"].tokens) == (10, 7)
    assert groups["decoder_text/"].attention == 8
    [alone] = [one for one in CONFIG.row_flops(0, ("text",)) if one.path == "stack"]
    assert alone.tokens == 7


def test_the_visible_share_of_tokens_is_exact():
    """In float64, 10 * (1 - 0.9) is less than 1."""
    counts = {
        (10, 0.9): 1,
        (10, 0.8): 2,
        (10, 0.7): 3,
        (49, 0.8): 9,
        (64, 0.3): 44,
        (512, 0.8): 102,
    }
    for (tokens, mask_ratio), visible in counts.items():
        one = ByteModality(name="text", length=tokens, mask_ratio=mask_ratio)
        assert (one.tokens, one.visible) == (tokens, visible)


def test_what_does_not_fit_is_refused(pretrained):
    model, params = pretrained
    with pytest.raises(UserError, match=r"'text' have shape \[9\], but the model's are \[10\]"):
        model.apply({"params": params}, {"text": np.zeros((1, 9))})
    with pytest.raises(UserError, match="'text' have dtype int32, but .* must be uint8"):
        model.apply({"params": params}, {"text": np.full((1, 10), 256, np.int32)})
    with pytest.raises(UserError, match="no modality 'smell'; it has video, points, text"):
        CONFIG.modality("smell")
    with pytest.raises(OutOfRange, match=r"size \[5, 8\], which patches of \[2, 4\]"):
        GridModality(name="depth", size=(5, 8), patch=(2, 4))
    with pytest.raises(OutOfRange, match="'depth' has patches of one value"):
        GridModality(name="depth", size=(8, 8), patch=(1, 1), norm_pix_loss=True)
    for name in ("weights", "a/b"):
        with pytest.raises(OutOfRange, match=f"model.modalities.name is '{name}'"):
            ByteModality(name=name, length=10)
    with pytest.raises(OutOfRange, match="groups and group_size may not be larger"):
        PointModality(name="points", points=4, groups=5, group_size=2)
    few = ByteModality(name="text", length=10, mask_ratio=0.95)
    with pytest.raises(OutOfRange, match="of the 10 tokens of the modality 'text', 0 are visible"):
        replace(CONFIG, modalities=(few,))
    with pytest.raises(OutOfRange, match=r"named \['text', 'text'\]"):
        replace(CONFIG, modalities=(CONFIG.modality("text"),) * 2)
