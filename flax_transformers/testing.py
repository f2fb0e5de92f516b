"""What tests on a CPU need, yours included: tiny configs, text to train on, comparisons.

Set the devices up before jax is used, as tests/conftest.py does::

    jax.config.update("jax_num_cpu_devices", 8)
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Container, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.families.bert import BertConfig
from flax_transformers.huggingface.family import build_model, family_of_json
from flax_transformers.huggingface.placement import boxed_parameters
from flax_transformers.models.config import (
    ComputeConfig,
    EncoderDecoderConfig,
    TextConfig,
    TransformerConfig,
)
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.batches import batches_on_mesh
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig

_WORDS = "the a of to and model layer token row reads writes holds returns each"


class GivenLogits:
    """Stands for a model's ``Unembedding``: its logits float32 [B, M, V] are what is given."""

    def __init__(self, logits_BMV: jax.Array) -> None:
        self._logits_BMV = logits_BMV
        self.table_VD = np.empty((logits_BMV.shape[-1], 0), np.float32)

    def logits(self) -> jax.Array:
        return self._logits_BMV


def write_corpus(path: str | os.PathLike[str], documents: int = 60, seed: int = 0) -> None:
    """A text file of ``documents`` short documents, empty lines between them."""
    rng = np.random.default_rng(seed)
    texts = []
    for _ in range(documents):
        sentences = [
            " ".join(rng.choice(_WORDS.split(), rng.integers(4, 12))).capitalize() + "."
            for _ in range(rng.integers(1, 8))
        ]
        texts.append(" ".join(sentences))
    Path(path).write_text("\n\n".join(texts) + "\n")


def tiny_bert(**changes: Any) -> BertConfig:
    """A BERT of two layers, 32 wide, over bytes, with dropout on."""
    small = BertConfig(
        vocab_size=262,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        intermediate_size=64,
        max_positions=64,
    )
    return dataclasses.replace(small, **changes)


_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_key_value_heads": None,
    "head_dim": None,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_positions": 64,
    "image_size": 32,
    "patch_size": 8,
    "embedding_size": 24,
    "position_buckets": 8,
    "stem_widths": (8, 16),
    "stage_widths": (16, 24, 32, 64),
    "stage_depths": (1, 2, 1, 2),
    "decoder_hidden_size": 24,
    "decoder_layers": 1,
    "decoder_heads": 3,
    "decoder_intermediate_size": 40,
    "num_frames": 4,
}


def tiny_model(architecture: str, **changes: Any) -> tuple[nn.Module, Any]:
    """A small model of any supported architecture, such as "LlamaForCausalLM", and parameters.

    ``changes`` are fields of the family's config. Parameters are what training starts from.
    """
    model = build_model(tiny_architecture(architecture, **changes), ComputeConfig())
    return model, _initial(model)


@partial(jax.jit, static_argnums=0)  # which compiles equal models once
def _initial(model: Any) -> Any:
    return nn.meta.unbox(boxed_parameters(model, jax.random.key(0)))


def tiny_architecture(architecture: str, **changes: Any) -> Any:
    """The config of ``tiny_model``, for which nothing is computed."""
    published = {"architectures": [architecture]}
    family = family_of_json(published)
    try:
        config = family.from_huggingface(published)
    except UserError:  # DeBERTa: without fields a file means another kind of model
        kind: Any = family.config
        config = kind(architecture=architecture)
    small = _small_sizes(config)
    if isinstance(config, EncoderDecoderConfig):  # whose decoder is like the encoder
        del small["decoder_intermediate_size"]
    if isinstance(config, TextConfig) and (images := config.image_encoder) is not None:
        small["vision"] = dataclasses.replace(images, **_small_sizes(images))
    small |= _special_ids(config, changes.get("vocab_size", _TINY["vocab_size"]))
    return dataclasses.replace(config, **small | changes)


def _small_sizes(config: TransformerConfig) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(config)}
    if config.max_positions is None:  # images have as many positions as patches
        fields.discard("max_positions")
    return {name: value for name, value in _TINY.items() if name in fields}


def _special_ids(config: Any, size: int) -> dict[str, Any]:
    """Ids of special tokens in a vocabulary of ``size``; high ones stay as far from its end."""

    def fit(token: int) -> int:
        return token if token < size else size - 1 - (config.vocab_size - 1 - token) % size

    ids: dict[str, Any] = {}
    for name in ("pad_id", "bos_id", "decoder_start_id", "eos_ids"):
        value = getattr(config, name, None)
        if isinstance(value, tuple):
            ids[name] = tuple(map(fit, value))
        elif value is not None:
            ids[name] = fit(value)
    return ids


def tiny_config(
    corpus: str | os.PathLike[str],
    store: str | os.PathLike[str],
    *,
    steps: int = 20,
    batch_size: int = 16,
    sequence_length: int = 32,
    micro_batches: int = 1,
    **changes: Any,
) -> TrainConfig:
    """A short run on ``corpus``, tokenised into ``store``; ``changes`` replace sections.

    Runs of any number of steps compile the same program, as the learning rate is constant.
    """
    config = TrainConfig(
        model=tiny_bert(),
        objective=MaskedLM(),
        data=TextData(
            source=TextSource(str(corpus)),
            tokenizer=TokenizerConfig("bytes"),
            validation_fraction=0.2,
            store=str(store),
            shards=2,
            prepare_processes=1,
        ),
        optimizer=AdamW(learning_rate=1e-2, schedule=Schedule("constant", warmup_steps=2)),
        phases=(Phase(steps, sequence_length, batch_size, micro_batches),),
        checkpoints=CheckpointConfig(every_steps=5),
        evaluation=Evaluation(every_steps=0, batch_size=16),
        logging=Logging(every_steps=1, tensorboard=False, example_log=True),
        compute=ComputeConfig(),  # float32 on every processor
    )
    return dataclasses.replace(config, **changes)


def batches_with_nan(bad: Container[int]) -> Callable[..., Any]:
    """What to replace ``batches_on_mesh`` of ``training.resume`` with to see a run diverge.

    All floating-point values of the batches ``bad`` (places in the stream, from 0) are NaN.
    """

    @contextlib.contextmanager
    def spoilt(config: TrainConfig, prepared: Any, mesh: Any, position: Any) -> Iterator[Any]:
        phase = config.phases[position.phase]
        first = position.examples // phase.batch_size

        def marked(batches: Any) -> Iterator[Any]:
            for number, (batch, ids) in enumerate(batches, first):
                if number in bad:
                    batch = {name: _as_nan(leaf) for name, leaf in batch.items()}
                yield batch, ids

        with batches_on_mesh(config, prepared, mesh, position) as batches:
            yield marked(batches)

    return spoilt


def _as_nan(leaf: jax.Array) -> jax.Array:
    return leaf * jnp.nan if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def assert_bit_equal(found: Any, expected: Any) -> None:
    """Two pytrees of arrays are the same to the last bit; names what differs."""
    different = []
    expected_leaves = jax.tree_util.tree_leaves_with_path(expected)
    found_leaves = jax.tree_util.tree_leaves_with_path(found)
    assert [path for path, _ in found_leaves] == [path for path, _ in expected_leaves]
    for (path, a), (_, b) in zip(found_leaves, expected_leaves, strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if (a.shape, a.dtype, a.tobytes()) != (b.shape, b.dtype, b.tobytes()):
            different.append(jax.tree_util.keystr(path))
    assert not different, f"not bit-equal: {', '.join(different)}"


def assert_parity(found: Any, expected: Any, where: Any = None, tolerance: float = 1e-5) -> None:
    """``found`` is ``expected`` to ``tolerance`` of its largest value.

    ``where`` names the places that count: ones among zeros, as in an attention mask, over the
    leading axes. Compare in float32 with ``jax.default_matmul_precision("highest")``.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"shape {found.shape}, not {expected.shape}"
    if where is not None:
        found, expected = (x[np.asarray(where) == 1] for x in (found, expected))
    difference = relative_difference(found, expected)
    assert difference <= tolerance, f"differs by {difference:.1e} of the largest value"


def relative_difference(found: Any, expected: Any) -> float:
    """Largest absolute difference over the largest absolute value expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(found - expected)) / np.max(np.abs(expected)))
