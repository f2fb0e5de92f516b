"""A tiny BERT on the documentation that is included in every Python installation.

Command:   flax-transformers train bert_tiny --workdir runs/bert_tiny
Hardware:  2 CPU cores, 7 minutes (measured while other jobs ran)
Expected:  held-out loss 5.08, unigram baseline 5.94 (measured, one seed, 2 CPU cores, CPython
           3.11.7). WordPiece training is not deterministic and the text depends on the Python
           version, so results differ slightly.

High learning rate and short sequences. bert_base.py has the published shape. modernbert_tiny.py,
with rotary positions, reaches 4.10 to 4.26 in the same time.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.bert import BertConfig
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=BertConfig(
            vocab_size=4096,
            hidden_size=256,
            num_layers=2,
            num_heads=4,
            intermediate_size=1024,
            max_positions=64,
            activation="gelu_tanh",
            dropout=0.0,
            attention_dropout=0.0,
        ),
        objective=MaskedLM(),
        data=TextData(
            tokenizer=TokenizerConfig("wordpiece", vocab_size=4096, lowercase=True),
            validation_fraction=0.05,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=1e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)),
        phases=(Phase(steps=600, sequence_length=64, batch_size=32),),
        compute=ComputeConfig(dtype="auto"),
        checkpoints=CheckpointConfig(every_steps=200),
        evaluation=Evaluation(every_steps=200, batch_size=64),
        logging=Logging(every_steps=10),
        seed=0,
    )
