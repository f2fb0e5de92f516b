"""A small RoBERTa on 19 English novels; sequences of full sentences cross chapter boundaries.

Command:   flax-transformers train roberta_small_books --workdir runs/roberta_small_books
Data:      19 books of Standard Ebooks (CC0), one JSON line per chapter with the keys book, author,
           doc and paragraphs; set --data.source.path if the file is elsewhere
Hardware:  2 CPU cores, 5 minutes (measured while other jobs ran)
Expected:  held-out loss 6.18, unigram baseline 6.63 (measured, one seed, 2 CPU cores)
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.roberta import RobertaConfig
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=RobertaConfig(
            vocab_size=4096,
            hidden_size=128,
            num_layers=2,
            num_heads=4,
            intermediate_size=512,
            max_positions=64,
            position_offset=1,
            pad_id=0,
            dropout=0.0,
            attention_dropout=0.0,
            init_std=0.05,
        ),
        objective=MaskedLM(),
        data=TextData(
            source=TextSource("data/standardebooks_en/books.jsonl.gz", text_field="paragraphs"),
            tokenizer=TokenizerConfig("wordpiece", vocab_size=4096),
            validation_fraction=0.02,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=2e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)),
        phases=(Phase(steps=400, sequence_length=64, batch_size=32),),
        checkpoints=CheckpointConfig(every_steps=200),
        evaluation=Evaluation(every_steps=200, max_examples=1024),
        logging=Logging(every_steps=20),
    )
