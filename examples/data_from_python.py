"""Training data from Python: a sequence, a grain dataset, and a generator.

    python data_from_python.py

A sequence, or anything with `__len__` and `__getitem__` such as a `grain.MapDataset`, is shuffled
and resumes exactly. A generator has no positions: a run that resumes starts it again, and a warning
says so.
"""

import logging
from collections.abc import Iterator

import grain
import jax
import numpy as np
import optax

import flax_transformers as ft
from flax_transformers.data.sequences import GeneratorBatches
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.families.bert import BertConfig
from flax_transformers.objectives.masked_lm import MaskedLM

TOKENIZER, OBJECTIVE = ByteTokenizer(), MaskedLM()
SHAPE = {"sequence_length": 32, "batch_size": 16}
TEXTS = [f"The square of {n} is {n * n}." for n in range(500)]


def generate() -> Iterator[str]:
    """Texts one after another, as from a stream."""
    yield from TEXTS


def main() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    as_list = ft.SequenceDataset(TEXTS, tokenizer=TOKENIZER, name="squares")
    as_grain = ft.SequenceDataset(
        grain.MapDataset.source(TEXTS).map(str.lower),
        tokenizer=TOKENIZER,
        name="lower-case squares",
    )
    trainer = ft.Trainer(
        model=BertConfig(
            vocab_size=262, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=64,
            max_positions=32,
        ),
        objective=OBJECTIVE,
        optimizer=optax.adamw(3e-3),
        mesh=ft.make_mesh(devices=jax.devices()[:1]),
    )  # fmt: skip
    state = trainer.init(seed=0)
    for data in (as_list, as_grain):
        with ft.training_batches(data, OBJECTIVE, **SHAPE) as batches:
            state = trainer.fit(state, batches, steps=10)
    stream = GeneratorBatches(
        generate, OBJECTIVE, TOKENIZER.vocabulary, tokenizer=TOKENIZER, **SHAPE
    )
    state = trainer.fit(state, stream, steps=10)
    print(f"trained for {int(state.step)} steps")

    # After five batches of 16: what a run that resumes there reads.
    straight = ft.training_batches(as_list, OBJECTIVE, **SHAPE)
    resumed = ft.training_batches(as_list, OBJECTIVE, position=5 * 16, **SHAPE)
    expected = [next(straight) for _ in range(6)][5]
    assert np.array_equal(next(resumed)["input_ids"], expected["input_ids"])
    print("a sequence resumes exactly")
    GeneratorBatches(
        generate, OBJECTIVE, TOKENIZER.vocabulary, tokenizer=TOKENIZER, position=80, **SHAPE
    )


if __name__ == "__main__":
    main()
