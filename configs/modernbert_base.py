"""ModernBERT base (arXiv:2412.13663), continued from published weights: 30 % of tokens masked.

Command:   flax-transformers train modernbert_base --workdir runs/modernbert \\
               --init-from answerdotai/ModernBERT-base --data.tokenizer.path DIR \\
               --data.source.path data/text
Hardware:  one GPU or TPU chip: batches of 32 sequences of 1,024 tokens
Data:      your own text, in data/text
Expected:  not run at this size
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.modernbert import SIZES
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=SIZES["modernbert-base"],
        objective=MaskedLM(mask_fraction=0.3),
        data=TextData(
            source=TextSource("data/text"),
            tokenizer=TokenizerConfig("byte_level_bpe", vocab_size=50_368),
            validation_fraction=0.005,
            shards=64,
            workers=4,
        ),
        optimizer=AdamW(
            learning_rate=1e-4,
            b2=0.98,
            schedule=Schedule("linear", warmup_steps=500),
        ),
        phases=(Phase(steps=20_000, sequence_length=1024, batch_size=32),),
        checkpoints=CheckpointConfig(every_steps=1_000),
        evaluation=Evaluation(every_steps=1_000, batch_size=32, max_examples=3_200),
        logging=Logging(every_steps=50),
    )
