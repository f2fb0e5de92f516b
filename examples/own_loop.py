"""A training loop of your own, on four virtual devices of this machine's CPU.

    python own_loop.py

`Trainer` gives the sharded state and the very step that `flax-transformers train` runs; the loop,
the batches and what is printed are yours. Takes about a minute on two cores.
"""

import jax
import optax

import flax_transformers as ft
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.families.bert import BertConfig
from flax_transformers.objectives.masked_lm import MaskedLM

STEPS = 30


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 4)  # before jax is used; leave it out on accelerators

    texts = [f"{a} times {b} is {a * b}." for a in range(30) for b in range(30)]
    data = ft.SequenceDataset(texts, tokenizer=ByteTokenizer(), name="products")
    objective = MaskedLM()
    trainer = ft.Trainer(
        model=BertConfig(
            vocab_size=262,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            intermediate_size=128,
            max_positions=32,
        ),
        objective=objective,
        optimizer=optax.adamw(3e-3),
        mesh=ft.make_mesh(data=2, fsdp=2),
    )
    state = trainer.init(seed=0)
    up = state.params["stack"]["layers"]["block_0"]["mlp"]["up"]["kernel"]
    print(f"a feed-forward kernel {up.shape} is sharded as {up.sharding.spec}")

    losses = []
    with ft.training_batches(data, objective, sequence_length=32, batch_size=32) as batches:
        for step, batch in zip(range(1, STEPS + 1), batches, strict=False):
            state, metrics = trainer.step(state, batch)
            losses.append(float(metrics["train/loss"]))
            if step % 10 == 0:
                print(f"step {step}: loss {losses[-1]:.3f}")
    assert losses[-1] < losses[0]


if __name__ == "__main__":
    main()
