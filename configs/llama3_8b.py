"""Llama 3 8B from scratch (arXiv:2407.21783): sequences of 8,192, four million tokens per step.

Command:   flax-transformers prepare llama3_8b
           flax-transformers train llama3_8b --workdir gs://bucket/llama3_8b
Hardware:  a TPU v5p slice of 64 chips, 4x4x4; the width of 4,096 is sharded into parts of 256
Data:      documents in data/web as JSON lines with the key "text"; the paper's 15 trillion tokens
           are not public
Expected:  not run
Planned:   not run. --topology v5p:4x4x4: 33.9 of 95.7 GiB per chip, a step time of at least 9.74 s,
           an MFU of at most 75.5 %

Learning rate, schedule and batch size are the paper's for 8B, without increasing batch size and
sequence length during the run. The vocabulary has the paper's size and is trained on the corpus.
"""

import dataclasses

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import Kind, TokenizerConfig
from flax_transformers.families.llama import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def web_text(kind: Kind, vocab_size: int) -> TextData:
    """The corpus, with a tokenizer of this kind and size."""
    return TextData(
        source=TextSource("data/web"),
        tokenizer=TokenizerConfig(kind, vocab_size=vocab_size),
        validation_fraction=0.0001,
        shards=4096,
        workers=8,
    )


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(
            SIZES["llama-3-8b"], pad_id=0, bos_id=None, eos_ids=(1,), attention_dropout=0.0
        ),
        objective=CausalLM(),
        data=web_text("bpe", vocab_size=128_256),
        optimizer=AdamW(
            learning_rate=3e-4,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            no_decay=("scale",),
            schedule=Schedule("cosine", warmup_steps=8_000, end_fraction=0.01),
        ),
        phases=(Phase(steps=1_200_000, sequence_length=8192, batch_size=512),),
        mesh=MeshConfig(data=-1, fsdp=16),
        compute=ComputeConfig("auto", remat="full"),
        checkpoints=CheckpointConfig(every_steps=1_000, keep_every=100_000),
        evaluation=Evaluation(every_steps=10_000, batch_size=512, max_examples=5_120),
        logging=Logging(every_steps=10),
    )
