"""Gated and plain feed-forward layers at equal parameters (Shazeer, arXiv:2002.05202).

Command:   flax-transformers sweep studies/gated_feed_forward.py --workdir runs/gated_feed_forward
Data:      the documentation that is included in every Python installation
Hardware:  2 CPU cores, 43 minutes (measured while other jobs ran)
Result:    docs/results/gated_feed_forward.md: the published effect does not appear
Size:      6 variants x 5 seeds, a ModernBERT of 2 layers, 128 wide, 400 steps

A gated layer has three matrices, a plain one two: with two thirds of the width both have the same
number of parameters. Nothing else differs, the learning rate included.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.modernbert import ModernBertConfig
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.sweeps.study import Study
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig

WIDTH = 384
"""Of a plain layer, 3 x 128. A gated one has two thirds."""


def plain(activation: str) -> dict[str, object]:
    return {
        "model.activation": activation,
        "model.gated": False,
        "model.intermediate_size": WIDTH,
    }


def gated(activation: str) -> dict[str, object]:
    return plain(activation) | {"model.gated": True, "model.intermediate_size": 2 * WIDTH // 3}


def get_study() -> Study:
    return Study(
        base=TrainConfig(
            model=ModernBertConfig(
                vocab_size=4096,
                hidden_size=128,
                num_layers=2,
                num_heads=4,
                intermediate_size=WIDTH,
                max_positions=64,
                init_std=0.05,
                pad_id=0,
            ),
            objective=MaskedLM(),
            data=TextData(
                tokenizer=TokenizerConfig("wordpiece", vocab_size=4096, lowercase=True),
                validation_fraction=0.05,
                shards=1,
            ),
            optimizer=AdamW(
                learning_rate=3e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=40)
            ),
            phases=(Phase(steps=400, sequence_length=64, batch_size=32),),
            checkpoints=CheckpointConfig(every_steps=400),
            evaluation=Evaluation(every_steps=0),
            logging=Logging(every_steps=50, tensorboard=False),
        ),
        variants={
            "relu": plain("relu"),
            "gelu": plain("gelu_tanh"),
            "silu": plain("silu"),
            "reglu": gated("relu"),
            "geglu": gated("gelu_tanh"),
            "swiglu": gated("silu"),
        },
        seeds=5,
        baseline="gelu",
        published=(
            "held-out log-perplexity of T5 base after 65,536 steps: ReLU 1.997, GELU 1.983, Swish "
            "1.994, ReGLU 1.953, GEGLU 1.942, SwiGLU 1.944"
        ),
        citation="Shazeer, GLU Variants Improve Transformer, arXiv:2002.05202, table 1",
        expected=(("reglu", "relu"), ("geglu", "gelu"), ("swiglu", "silu")),
    )
