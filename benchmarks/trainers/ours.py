"""Trains a BERT with this package, and writes when each step ended and what it learned from."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np

import flax_transformers as ft
from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare, training_examples
from flax_transformers.data.pipeline.loader import TrainStream
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.bert import BertConfig
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.training.callbacks import Callback
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig
from flax_transformers.training.state import TrainState


class Times(Callback):
    """Seconds since 1970 at the end of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step(self, step: int, state: TrainState) -> None:
        jax.block_until_ready(state.step)
        self.times.append(time.time())


def config_of(settings: dict) -> TrainConfig:
    folder = Path(settings["folder"])
    tokenizer = ft.load_tokenizer(folder / "tokenizer")
    return TrainConfig(
        model=BertConfig(
            architecture="BertForMaskedLM",
            vocab_size=tokenizer.vocabulary.size,
            max_positions=settings["length"],
            **settings["model"],
        ),
        objective=MaskedLM(),
        data=TextData(
            source=TextSource(str(folder / "documents.jsonl")),
            tokenizer=TokenizerConfig("wordpiece", path=str(folder / "tokenizer")),
            validation_fraction=0.0,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=1e-4),
        phases=(
            Phase(
                steps=settings["steps"],
                sequence_length=settings["length"],
                batch_size=settings["batch"],
            ),
        ),
        evaluation=Evaluation(every_steps=10**6),
        logging=Logging(every_steps=10),
        compute=ComputeConfig(dtype="float32"),  # as the Trainer's
    )


def useful_tokens(config: TrainConfig) -> list[int]:
    """Tokens of each batch that are not padding; the stream is a pure function of the position."""
    phase = config.phases[0]
    prepared = prepare(config.data)
    stream = TrainStream(
        training_examples(prepared, config.objective.window_spec(phase.sequence_length)),
        config.objective,
        prepared.vocabulary,
        sequence_length=phase.sequence_length,
        batch_size=phase.batch_size,
        seed=(config.seed, 0),
    )
    with stream:
        batches = [next(stream) for _ in range(phase.steps)]
    pad = prepared.vocabulary.pad_id
    return [int(np.sum(batch["input_ids"] != pad)) for batch in batches]


def main(settings: dict) -> None:
    config, times = config_of(settings), Times()
    workdir = Path(settings["folder"]) / f"ours_{settings['run']}"
    ft.train(config, workdir, callbacks=[times])
    useful = useful_tokens(config)
    tokens = [settings["batch"] * settings["length"]] * len(useful)
    result = {"times": times.times, "useful_tokens": useful, "tokens": tokens}
    Path(settings["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
