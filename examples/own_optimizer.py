"""An optax optimizer and a schedule of your own: in a Trainer by object, in a run by config file.

    python own_optimizer.py
    flax-transformers train own_optimizer.py --workdir runs/own_optimizer --optimizer.peak 1e-3

A config's `optimizer` is any frozen dataclass with `make(total_steps)`. Its statistics are sharded
as the parameters that they belong to, and saved and restored with the state.
"""

import tempfile
from dataclasses import dataclass, replace

import jax
import optax

import flax_transformers as ft
from flax_transformers.training.config import Phase, TrainConfig


@dataclass(frozen=True)
class Triangle:
    """A schedule: up to the peak in the middle of the run, and down again."""

    def make(self, peak: float, total_steps: int) -> optax.Schedule:
        middle = max(1, total_steps // 2)
        up = optax.linear_schedule(0.1 * peak, peak, middle)
        down = optax.linear_schedule(peak, 0.0, total_steps - middle)
        return optax.join_schedules([up, down], [middle])


@dataclass(frozen=True)
class LionAndAdam:
    """An optimizer: Lion for the matrices of layers, Adam for all else, behind one clip."""

    peak: float = 3e-3
    max_grad_norm: float = 1.0
    schedule: Triangle = Triangle()

    def learning_rate_at(self, total_steps: int) -> optax.Schedule:
        """What is logged as optimizer/learning_rate (optional)."""
        return self.schedule.make(self.peak, total_steps)

    def make(self, total_steps: int) -> optax.GradientTransformation:
        rate = self.learning_rate_at(total_steps)
        kinds = {"matrix": optax.lion(rate), "other": optax.adam(rate)}

        def kind(params: optax.Params) -> optax.Params:
            # Kernels of layers are stacked, [L, D, F]; tables and stacked biases have two axes.
            return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 2 else "other", params)

        clip = optax.clip_by_global_norm(self.max_grad_norm)
        return optax.chain(clip, optax.partition(kinds, kind))


def get_config() -> TrainConfig:
    recipe = ft.recipe("bert_tiny")
    return replace(
        recipe,
        model=replace(recipe.model, hidden_size=64, intermediate_size=128),
        optimizer=LionAndAdam(),
        phases=(Phase(steps=20, sequence_length=32, batch_size=16),),
    )


class Rates(ft.Callback):
    """Keeps the learning rates that were logged."""

    def __init__(self) -> None:
        self.rates: dict[int, float] = {}

    def on_metrics(self, step: int, metrics: dict[str, float]) -> None:
        self.rates[step] = metrics["optimizer/learning_rate"]


def main() -> None:
    rates = Rates()
    with tempfile.TemporaryDirectory() as workdir:
        outcome = ft.train(get_config(), workdir, callbacks=[rates])
    print(f"step {outcome.step}: loss {outcome.metrics['train/loss']:.3f}, rates {rates.rates}")
    assert rates.rates[10] > rates.rates[20]


if __name__ == "__main__":
    main()
