"""What cuDNN is sent, carried out by JAX's own reference in its place: there is no GPU here."""

from __future__ import annotations

from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_transformers.errors import UserError
from flax_transformers.models.kernels.dispatch import dot_product_attention
from flax_transformers.models.kernels.masks import AttentionMask
from flax_transformers.models.kernels.relative_position_bias import RelativePositionBias
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.parallel.rules import RULES
from tests.models.kernel_cases import draw

SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]])
MASKS = {
    "none": AttentionMask(),
    "causal": AttentionMask(causal=True),
    "causal window": AttentionMask(causal=True, window=(2, 9)),
    "window": AttentionMask(window=(1, 2)),
    "packed and causal": AttentionMask.within(SEGMENTS, causal=True),
    "prefix": AttentionMask(key_prefix=SEGMENTS == 1, causal=True),
}


@pytest.fixture
def sent(monkeypatch):
    """The masks that cuDNN was sent."""
    masks, reference = [], jax.nn.dot_product_attention

    def instead(*qkv, implementation, mask=None, **options):
        assert implementation == "cudnn"
        masks.append(mask)
        return reference(*qkv, mask=mask, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    return masks


def half(*shape, **options):
    return [jnp.asarray(x, jnp.bfloat16) for x in draw(*shape, **options)]


@pytest.mark.parametrize("name", MASKS)
def test_what_it_is_sent_means_the_same(name, sent):
    q, k, v = half(6, heads=4, key_heads=2)
    mesh = make_mesh(MeshConfig(data=2, tensor=2), jax.devices()[:4])
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        attend = jax.jit(
            lambda q, k, v, mask: dot_product_attention(q, k, v, mask=mask, kernel="cudnn")
        )
        ours = attend(q, k, v, MASKS[name])
    plain = dot_product_attention(q, k, v, mask=MASKS[name])
    np.testing.assert_allclose(np.float32(ours), np.float32(plain), atol=2**-6)
    assert [mask is None for mask in sent] == [name in ("none", "causal", "causal window")]


CANNOT = {
    "apply model.attention_dropout": {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
    "the gradient of a bias": {"bias": RelativePositionBias(jnp.zeros((4, 3)))},
}


@pytest.mark.parametrize("reason", CANNOT)
def test_it_says_what_it_cannot_do(reason, sent):
    with pytest.raises(UserError, match=f"cudnn cannot .*{reason}"):
        dot_product_attention(*half(6), **CANNOT[reason], kernel="cudnn")
    dot_product_attention(*half(6), **CANNOT[reason], kernel="cudnn or xla")
    assert not sent


@pytest.mark.parametrize("capability", ["7.0", "7.5", "gfx942", None, "8.0", "8.6", "10.0"])
def test_it_takes_only_gpus_that_have_the_kernel(capability, sent, monkeypatch):
    gpu = SimpleNamespace(device_kind="GPU")
    if capability is not None:
        gpu.compute_capability = capability
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [gpu])
    dot_product_attention(*half(6), kernel="cudnn or xla")
    assert bool(sent) == (capability in ("8.0", "8.6", "10.0"))
    if not sent:
        with pytest.raises(UserError, match="cudnn cannot run on GPU, without NVIDIA's compute"):
            dot_product_attention(*half(6), kernel="cudnn")


def test_it_takes_no_float32_no_odd_masked_rows_and_no_odd_heads(sent):
    cases = (
        (draw(6), "compute in float32"),
        (half(6, width=12), "width 12"),
        (half(6, width=136), "136"),
    )
    for operands, reason in cases:
        with pytest.raises(UserError, match=f"cudnn cannot .*{reason}"):
            dot_product_attention(*operands, kernel="cudnn")
    packed = AttentionMask.within(SEGMENTS[:, :5])
    with pytest.raises(UserError, match="cudnn cannot mask sequences of odd lengths, 5 and 5"):
        dot_product_attention(*half(5), mask=packed, kernel="cudnn")
    assert not sent
