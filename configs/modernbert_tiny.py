"""A tiny ModernBERT on the documentation that is included in every Python installation: the demo.

Command:   flax-transformers train modernbert_tiny --workdir runs/demo   (or: make demo)
Hardware:  2 CPU cores (AMD EPYC), 2 min 38 s; 6 minutes while other jobs ran
Expected:  held-out loss 4.10 to 4.26, unigram baseline 5.94 (measured, eight runs, CPython 3.11.7).
           WordPiece training is not deterministic and the text depends on the Python version.

A high learning rate and short sequences, so that the model learns to use context within minutes.
"flax-transformers convert runs/demo DIR" exports it for the fill-mask pipeline of transformers.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.modernbert import ModernBertConfig
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModernBertConfig(
            vocab_size=4096,
            hidden_size=256,
            num_layers=2,
            num_heads=4,
            intermediate_size=512,
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
        optimizer=AdamW(learning_rate=2e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=50)),
        phases=(Phase(steps=600, sequence_length=64, batch_size=32),),
        compute=ComputeConfig(dtype="float32"),
        checkpoints=CheckpointConfig(every_steps=200),
        evaluation=Evaluation(every_steps=200, batch_size=64),
        logging=Logging(every_steps=10),
        seed=0,
    )
