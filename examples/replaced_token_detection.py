"""An objective of your own with a head of its own: replaced-token detection.

    python replaced_token_detection.py     # all that follows, on tiny data, in two minutes

    flax-transformers train replaced_token_detection.py --workdir runs/rtd --data.workers 2
    flax-transformers train replaced_token_detection.py --workdir runs/rtd --phases.0.steps 40
    flax-transformers evaluate runs/rtd --config replaced_token_detection.py

ELECTRA (arXiv:2003.10555) trains a model to tell tokens of the text from tokens that a small
generator put in their place. The package has that objective, with the generator
(`configs/electra_tiny.py`). Here the replacements are drawn at random, by classes of your own: this
file is a config file, and nothing in the package knows its classes, which a checkpoint names as
`replaced_token_detection:ReplacedTokens`.
"""

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import flax_transformers as ft
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.bert import BertConfig
from flax_transformers.models.text import TextModel, Tokens
from flax_transformers.objectives.base import (
    Batch,
    ExampleView,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Vocabulary,
    WindowSpec,
)
from flax_transformers.objectives.rows import frame, pad, random_ordinary
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


class Discriminator(TextModel):
    """The layers of BERT, and a number for each token: how likely it was replaced."""

    def setup(self) -> None:
        super().setup()
        self.replaced_head = nn.Dense(1, dtype=self.dtype)

    def replaced(self, hidden_BTD: jax.Array, *, deterministic: bool = True) -> jax.Array:
        """Logits float32 [B, T]."""
        return self.replaced_head(hidden_BTD)[..., 0].astype("float32")

    def head_outputs(
        self, hidden_BTD: jax.Array, tokens: Tokens, deterministic: bool
    ) -> dict[str, jax.Array]:
        return {"logits": self.replaced(hidden_BTD)}


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig(BertConfig):
    """A BERT whose only architecture is the discriminator."""

    architecture: str = "Discriminator"


ft.register(ft.Family(config=DiscriminatorConfig, architectures={"Discriminator": Discriminator}))


@dataclass(frozen=True)
class ReplacedTokens:
    """The objective. ``fraction`` of the tokens are replaced by random ones."""

    fraction: float = 0.15

    needs: ClassVar[ModelNeeds] = ModelNeeds(("replaced",), ("attention_mask",))

    def window_spec(self, sequence_length: int) -> WindowSpec:
        return WindowSpec(sequence_length - 2, cross_documents=True)  # [CLS] and [SEP] are added

    def predictions(self, sequence_length: int) -> int:
        return 0  # no position gets logits over the vocabulary

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """Runs in the data workers, in numpy: one example of fixed shapes."""
        original = frame(example, vocab)
        ordinary = ~np.isin(original, vocab.special_ids)
        chosen = ordinary & (rng.random(len(original)) < self.fraction)
        ids = original.copy()
        ids[chosen] = random_ordinary(rng, int(chosen.sum()), vocab)
        return {
            "input_ids": pad(ids, sequence_length, vocab.pad_id),
            "attention_mask": pad(np.ones(len(ids), np.int32), sequence_length, 0),
            "replaced": pad((ids != original).astype(np.int32), sequence_length, 0),
            "weights": pad(ordinary.astype(np.float32), sequence_length, 0),
        }

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Any]
    ) -> LossTerms:
        """Runs on the devices, in jax: sums and weights of a batch."""
        hidden_BTD = model.hidden_states(params, batch, rngs).last_hidden_state
        logits_BT = model.head("replaced", params, rngs, hidden_BTD)
        labels_BT, weights_BT = batch["replaced"], batch["weights"]
        loss_BT = optax.sigmoid_binary_cross_entropy(logits_BT, labels_BT)
        count = jnp.sum(weights_BT)
        loss = jnp.sum(loss_BT * weights_BT)
        correct = jnp.sum(((logits_BT > 0) == labels_BT) * weights_BT)
        return LossTerms(
            losses={"replaced": (loss, count, 1.0)},
            metrics={"loss": (loss, count), "accuracy": (correct, count)},
        )

    def example_views(self, row: dict[str, np.ndarray]) -> list[ExampleView]:
        used = int(row["attention_mask"].sum())
        return [ExampleView("row", row["input_ids"][:used], classes=row["replaced"][:used])]


def get_config() -> TrainConfig:
    return TrainConfig(
        model=DiscriminatorConfig(
            vocab_size=262, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=128,
            max_positions=32,
        ),
        objective=ReplacedTokens(),
        data=TextData(tokenizer=TokenizerConfig("bytes"), shards=1),
        optimizer=AdamW(learning_rate=1e-3),
        phases=(Phase(steps=20, sequence_length=32, batch_size=16),),
        checkpoints=CheckpointConfig(every_steps=10),
        evaluation=Evaluation(every_steps=0, batch_size=16, max_examples=64),
        logging=Logging(every_steps=10, tensorboard=False),
    )  # fmt: skip


def run(*arguments: str, processes: int = 1) -> None:
    """``flax-transformers ARGUMENTS`` in so many processes of one job."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    started = []
    for index in range(processes):
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        if processes > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": str(processes),
                "JAX_PROCESS_ID": str(index),
            }
        command = [sys.executable, "-m", "flax_transformers", *arguments]
        started.append(subprocess.Popen(command, env=environment))
    codes = [process.wait() for process in started]
    assert codes == [0] * processes, f"{' '.join(arguments)}: exit codes {codes}"


def main() -> None:
    here = os.path.abspath(__file__)
    with tempfile.TemporaryDirectory() as folder:
        options = ["--workdir", f"{folder}/run", "--data.store", f"{folder}/store"]
        run("prepare", here, "--output", f"{folder}/store")
        run("train", here, *options, "--data.workers", "1", processes=2)
        run("train", here, *options, "--phases.0.steps", "30", "--data.workers", "1")
        run("evaluate", f"{folder}/run", "--config", here, "--data.store", f"{folder}/store")


if __name__ == "__main__":
    main()
