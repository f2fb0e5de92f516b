"""Embeddings for a list of sentences, in six lines.

    python sentence_embeddings.py [DIRECTORY]

DIRECTORY is a sentence encoder in Hugging Face or sentence-transformers format, such as a download
of all-MiniLM-L6-v2. Without one, a small encoder with random weights is written first.
"""

import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

import flax_transformers as ft
from flax_transformers.huggingface.sentence_transformers import sentence_length


def embed(directory: str, sentences: list[str]) -> jax.Array:
    """float32 [sentences, width], of length 1."""
    model, params = ft.load_pretrained(directory)
    tokenizer = ft.load_tokenizer(directory)
    length = sentence_length(Path(directory)) or model.config.max_positions
    batch = tokenizer(sentences, max_length=length)
    return model.apply({"params": params}, **batch).sentence_embedding


def write_random_encoder(directory: str) -> None:
    """A BERT of two layers over bytes, with random weights."""
    from flax_transformers.data.tokenizers.kinds import ByteTokenizer
    from flax_transformers.testing import tiny_model

    model, params = tiny_model(
        "BertModel", vocab_size=262, pooling="mean", normalize_embeddings=True
    )
    ft.save_pretrained(directory, model, params, tokenizer=ByteTokenizer())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        directory = sys.argv[1] if len(sys.argv) > 1 else f"{folder}/encoder"
        if len(sys.argv) == 1:
            write_random_encoder(directory)
        embeddings = embed(directory, ["A cat sat.", "A cat sat down.", "Rates rose by 2 %."])
    print(np.asarray(embeddings @ embeddings.T).round(3))
    assert np.allclose(np.linalg.norm(embeddings, axis=-1), 1, atol=1e-5)


if __name__ == "__main__":
    main()
