"""A tiny BERT with next-sentence prediction, on the documentation in every Python installation.

Command:   flax-transformers train bert_tiny_pairs --workdir runs/bert_tiny_pairs
Hardware:  2 CPU cores, 18 minutes (measured on 2026-11-28 while other jobs ran)
Expected:  next-sentence accuracy 71.3 % of 202 held-out pairs, chance 50 %; held-out masked-LM loss
           4.46, unigram baseline 5.98 (measured, one seed, CPython 3.11.7). WordPiece training is
           not deterministic and the text depends on the Python version, so results differ slightly.

Whether one text follows another is learned late: held-out accuracy was 48.5 % after 550 steps,
58.9 % after 1,100, 66.8 % after 1,650, and it still rises at the end. bert_small_books.py, with a
fifteenth of the examples, ends before.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.bert import BertConfig
from flax_transformers.objectives.next_sentence import NextSentence
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=BertConfig(
            architecture="BertForPreTraining",
            vocab_size=4096,
            hidden_size=128,
            num_layers=2,
            num_heads=4,
            intermediate_size=512,
            max_positions=64,
            activation="gelu_tanh",
            dropout=0.0,
            attention_dropout=0.0,
            init_std=0.05,
        ),
        objective=NextSentence(),
        data=TextData(
            tokenizer=TokenizerConfig("wordpiece", vocab_size=4096, lowercase=True),
            validation_fraction=0.05,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=1e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=200)),
        phases=(Phase(steps=2_200, sequence_length=64, batch_size=64),),
        checkpoints=CheckpointConfig(every_steps=1_100),
        evaluation=Evaluation(every_steps=550, batch_size=64),
        logging=Logging(every_steps=100),
    )
