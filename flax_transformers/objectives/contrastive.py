"""Contrastive learning of images and texts: CLIP (arXiv:2103.00020), SigLIP (arXiv:2303.15343)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from flax_transformers import ranges
from flax_transformers.objectives.base import (
    Array,
    Arrays,
    Batch,
    ExampleView,
    Frame,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Rng,
    Rngs,
    Vocabulary,
    WindowSpec,
)
from flax_transformers.objectives.images import PixelInput, pixels_of
from flax_transformers.objectives.rows import end_id, padded_tokens, start_id


@dataclass(frozen=True)
class ImageTextSpec(WindowSpec):
    """Square images with sides of ``image_size`` pixels, and texts of at most ``length`` tokens."""

    cross_documents: bool = False
    image_size: int = 224


@dataclass(frozen=True, kw_only=True)
class ImageTextContrastive(PixelInput):
    """Tell the pairs of images and texts of a batch from all other combinations of them.

    The loss couples the rows of a batch: sums of its micro-batches do not add up to that of the
    batch, as ``LossTerms`` has it elsewhere. What is exact instead is ``whole_batch_terms``, which
    the training step calls once for the whole global batch, on any mesh and for any number of
    micro-batches. The weight is the number of pairs.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(
        ("embed_image", "embed_text", "scale_and_bias"), ("input_ids", "pixel_values")
    )

    loss: Literal["softmax", "sigmoid"] = "softmax"
    """Softmax over the batch, with a scale of at most 100 (CLIP), or a sigmoid for each pair, with
    the model's bias (SigLIP)."""
    image_size: int = 224
    """Pixels of a side. If it differs from the model's, the positions are interpolated."""

    RANGES: ClassVar[ranges.Ranges] = {"image_size": ranges.PIXELS}

    def window_spec(self, sequence_length: int) -> ImageTextSpec:
        return ImageTextSpec(sequence_length, image_size=self.image_size)

    def frame(self, vocab: Vocabulary) -> Frame:
        """The special tokens around a text: those of the tokenizer's own files, or else its start
        token, if it has one, and its end token."""
        start = start_id(vocab)
        own = vocab.frame or Frame(() if start is None else (start,))
        return own if own.after else Frame(own.before, (end_id(vocab),))

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """``pixel_values`` uint8 [C, side, side]; ``input_ids`` and ``attention_mask`` int32
        [sequence_length] of the text, cut to fit; ``weights`` float32 [], 1."""
        return {
            "pixel_values": pixels_of(example),
            **self.prepare_text(example["tokens"], vocab, sequence_length),
            "weights": np.array(1.0, np.float32),
        }

    def prepare_text(self, tokens: np.ndarray, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """``input_ids`` and ``attention_mask`` int32 [sequence_length] of tokens int32 [n]."""
        frame = self.frame(vocab)
        kept = tokens[: max(0, sequence_length - len(frame.before) - len(frame.after))]
        ids = np.concatenate([frame.before, kept, frame.after]).astype(np.int32)
        return padded_tokens(ids[:sequence_length], sequence_length, vocab)

    def example_views(self, row: Arrays) -> list[ExampleView]:
        """The text; images are shown as pictures."""
        return [ExampleView("caption", row["input_ids"][row["attention_mask"] > 0])]

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """``whole_batch_terms`` in one chunk."""
        return self.whole_batch_terms(model, params, batch, rngs, 1)

    def whole_batch_terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs, chunks: int
    ) -> LossTerms:
        """The loss "contrastive"; the metrics "loss" and "accuracy", the share of images whose own
        text is the most similar of the batch.

        The batch is embedded in ``chunks``, whose activations the backward pass computes again one
        by one (gradient caching, arXiv:2101.06983): the gradient is that of the whole batch.
        """
        import jax.numpy as jnp  # not at the top: data workers must not import jax

        from flax_transformers.objectives.contrastive_loss import (
            clipped_scale,
            sigmoid_loss,
            softmax_loss,
        )

        image_BE, text_BE = self._embeddings(model, params, batch, rngs, chunks)
        log_scale, bias = model.head("scale_and_bias", params, {})
        weight_B = batch["weights"]
        if self.loss == "softmax":
            loss, correct = softmax_loss(image_BE, text_BE, weight_B, clipped_scale(log_scale))
        else:
            loss, correct = sigmoid_loss(image_BE, text_BE, weight_B, jnp.exp(log_scale), bias)
        count = jnp.sum(weight_B)
        return LossTerms(
            losses={"contrastive": (loss, count, 1.0)},
            metrics={"loss": (loss, count), "accuracy": (correct, count)},
        )

    def _embeddings(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs, chunks: int
    ) -> tuple[Array, Array]:
        """Embeddings of images and of texts, float32 [B, E]."""
        if chunks == 1:
            return self.embed(model, params, batch, rngs)
        import jax
        import jax.numpy as jnp

        def split(leaf: Array) -> Array:  # chunk k has rows k, k + K, ..., as micro-batches
            return leaf.reshape(-1, chunks, *leaf.shape[1:]).swapaxes(0, 1)

        def one(carry: None, numbered: tuple[Array, Batch]) -> tuple[None, tuple[Array, Array]]:
            index, part = numbered
            keys = {name: jax.random.fold_in(key, index) for name, key in rngs.items()}
            return carry, self.embed(model, params, part, keys)

        inputs = {name: batch[name] for name in ("pixel_values", "input_ids")}
        numbered = (jnp.arange(chunks), jax.tree.map(split, inputs))
        _, found = jax.lax.scan(jax.checkpoint(one, prevent_cse=False), None, numbered)
        image_BE, text_BE = (x.swapaxes(0, 1).reshape(-1, x.shape[-1]) for x in found)
        return image_BE, text_BE

    def embed(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs
    ) -> tuple[Array, Array]:
        """Embeddings of the images and of the texts of a batch, float32 [B, E].

        Models are not told where padding is: CLIP's encoder does not reach beyond the end of a
        text, and SigLIP's reads padding as in the original.
        """
        pixels = self.normalized(batch["pixel_values"])
        image_BE = model.head("embed_image", params, rngs, pixels, interpolate_pos_encoding=True)
        return image_BE, model.head("embed_text", params, rngs, batch["input_ids"])

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``image`` and ``text`` float32 [B, E], and the ids of the texts, ``input_ids``."""
        image_BE, text_BE = self.embed(model, params, batch, {})
        return {"image": image_BE, "text": text_BE, "input_ids": batch["input_ids"]}
