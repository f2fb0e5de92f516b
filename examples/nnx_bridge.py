"""A model of this package as a part of a Flax NNX module, trained by NNX's own tools.

    python nnx_bridge.py

`flax.nnx.bridge.ToNNX` wraps any Linen module. Here a small ModernBERT gets an NNX head that tells
two kinds of sentences apart; encoder and head are trained together by `nnx.Optimizer`. Loaded
weights come along: `ft.load_pretrained` gives the module and its parameters. Takes seconds.
"""

import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import flax_transformers as ft
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.testing import tiny_model

STEPS = 30


class Classifier(nnx.Module):
    """An encoder of this package, the mean over its tokens, and a linear layer."""

    def __init__(self, encoder: Any, width: int, rngs: nnx.Rngs) -> None:
        self.encoder = encoder
        self.head = nnx.Linear(width, 2, rngs=rngs)

    def __call__(self, input_ids: jax.Array, attention_mask: jax.Array) -> jax.Array:
        """Logits, float32 [B, 2], for int32 [B, T] inputs."""
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
        return self.head((hidden * weight).sum(1))


def as_nnx(model: Any, params: dict[str, Any], **inputs: jax.Array) -> nnx.Module:
    """The Linen ``model`` with ``params`` as an NNX module, called as the original is."""
    with nnx.use_eager_sharding(False):  # logical axes are names of no mesh
        wrapped = nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(**inputs)
    nnx.update(wrapped, nnx.State(params))  # which has the same names
    return wrapped


@nnx.jit
def train_step(
    classifier: Classifier, optimizer: nnx.Optimizer, batch: dict[str, jax.Array], labels: jax.Array
) -> jax.Array:
    """Updates both in place and returns the loss."""

    def loss(classifier: Classifier) -> jax.Array:
        each = optax.softmax_cross_entropy_with_integer_labels(classifier(**batch), labels)
        return each.mean()

    value, grads = nnx.value_and_grad(loss)(classifier)
    optimizer.update(classifier, grads)
    return value


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:  # a published model would be loaded the same way
        ft.save_pretrained(
            f"{folder}/encoder",
            *tiny_model("ModernBertModel", vocab_size=262),
            tokenizer=ByteTokenizer(),
        )
        model, params = ft.load_pretrained(f"{folder}/encoder")
        tokenizer = ft.load_tokenizer(f"{folder}/encoder")
    texts = [f"{n} is odd" if n % 2 else f"the number {n}" for n in range(32)]
    labels = jnp.arange(32) % 2
    batch = jax.tree.map(jnp.asarray, tokenizer(texts))

    encoder = as_nnx(model, params, **batch)
    ours = model.apply({"params": params}, **batch).last_hidden_state
    assert np.allclose(encoder(**batch).last_hidden_state, ours, atol=1e-5)

    classifier = Classifier(encoder, model.config.hidden_size, nnx.Rngs(1))
    optimizer = nnx.Optimizer(classifier, optax.adamw(1e-2), wrt=nnx.Param)
    losses = [float(train_step(classifier, optimizer, batch, labels)) for _ in range(STEPS)]
    print(f"loss {losses[0]:.3f} before and {losses[-1]:.3f} after {STEPS} steps")
    assert losses[-1] < losses[0] / 2


if __name__ == "__main__":
    main()
