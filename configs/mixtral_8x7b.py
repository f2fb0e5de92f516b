"""Mixtral 8x7B from scratch (arXiv:2401.04088): 47 billion parameters, 13 billion per token.

Command:   flax-transformers prepare mixtral_8x7b
           flax-transformers train mixtral_8x7b --workdir gs://bucket/mixtral_8x7b
Hardware:  a TPU v5p slice of 128 chips, 4x4x8; each expert is on an eighth of them
Data:      as llama3_8b.py, with a vocabulary of 32,000
Expected:  not run; the paper does not describe training, and the learning rate is that of
           llama3_70b.py
Planned:   not run. --topology v5p:4x4x8: 22.2 of 95.7 GiB per chip, a step time of at least 8.64 s,
           an MFU of at most 65.8 %
"""

import dataclasses

import llama3_8b  # recipes may import others of their folder

from flax_transformers.families.mixtral import SIZES
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import Phase, TrainConfig


def get_config() -> TrainConfig:
    config = llama3_8b.get_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(SIZES["mixtral-8x7b"], pad_id=0, bos_id=None, eos_ids=(1,)),
        objective=CausalLM(balance_weight=0.02),
        data=llama3_8b.web_text("bpe", vocab_size=32_000),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1.5e-4),
        phases=(Phase(steps=1_000_000, sequence_length=4096, batch_size=1024),),
        mesh=MeshConfig(data=-1, fsdp=16, expert=8),
    )
