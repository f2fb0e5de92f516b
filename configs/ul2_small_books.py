"""A small UL2, trained with a mixture of denoisers on 19 English novels.

Command:   flax-transformers train ul2_small_books --workdir runs/ul2_small_books
Data:      19 books of Standard Ebooks (CC0), one JSON line per chapter with the keys book, author,
           doc and paragraphs; set --data.source.path if the file is elsewhere
Hardware:  2 CPU cores, 3 to 6 minutes (measured while other jobs ran)
Expected:  held-out loss 5.45, unigram baseline of the targets 5.87 (measured, three seeds)
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.t5 import T5Config
from flax_transformers.objectives.mixture_of_denoisers import MixtureOfDenoisers
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=T5Config(
            vocab_size=4096,
            hidden_size=128,
            num_layers=2,
            num_heads=4,
            head_dim=32,
            intermediate_size=256,
            gated=True,
            activation="gelu_tanh",
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
        ),
        objective=MixtureOfDenoisers(),
        data=TextData(
            source=TextSource("data/standardebooks_en/books.jsonl.gz", text_field="paragraphs"),
            tokenizer=TokenizerConfig(
                "unigram", vocab_size=4096, training_documents=400, sentinels=32
            ),
            validation_fraction=0.02,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=3e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)),
        phases=(Phase(steps=400, sequence_length=64, batch_size=32),),
        checkpoints=CheckpointConfig(every_steps=200),
        evaluation=Evaluation(every_steps=200, max_examples=1024),
        logging=Logging(every_steps=20),
    )
