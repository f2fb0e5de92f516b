"""A small GPT-2 on the bytes of tinyshakespeare.

Command:   cd data/tinyshakespeare
           head -c 1003854 input.txt > train.txt; tail -c +1003855 input.txt > validation.txt
           cd ../..
           flax-transformers train gpt_tiny_shakespeare --workdir runs/shakespeare
Data:      data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn (public domain), split as
           nanoGPT does: the last tenth is held out. Set --data.source.path and
           --data.validation-source.path if the files are elsewhere
Hardware:  2 CPU cores, 3 to 4 minutes (measured on one of them, while a job ran on the other)
Expected:  held-out loss 1.825, 1.815 and 1.816 nats per byte with seeds 0, 1 and 2, byte-trigram
           baseline 2.08 (measured), after 1.1 M tokens. nanoGPT's README reports 1.88 per character
           for its model of this size on a CPU, after 1.5 M tokens in about 3 minutes
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=GPT2Config(
            vocab_size=262,
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            intermediate_size=512,
            max_positions=64,
            dropout=0.0,
            attention_dropout=0.0,
            init_std=0.05,
            pad_id=0,
            bos_id=1,
            eos_ids=(1,),
        ),
        objective=CausalLM(),
        data=TextData(
            source=TextSource("data/tinyshakespeare/train.txt", documents="file"),
            validation_source=TextSource("data/tinyshakespeare/validation.txt", documents="file"),
            tokenizer=TokenizerConfig("bytes"),
            shards=1,
        ),
        optimizer=AdamW(
            learning_rate=4e-3,
            b2=0.99,
            weight_decay=0.05,
            schedule=Schedule("cosine", warmup_steps=100, end_fraction=0.1),
        ),
        phases=(Phase(steps=1100, sequence_length=64, batch_size=16),),
        checkpoints=CheckpointConfig(every_steps=550),
        evaluation=Evaluation(every_steps=550),
        logging=Logging(every_steps=20),
    )
