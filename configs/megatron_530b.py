"""The shape of Megatron-Turing NLG 530B (arXiv:2201.11990): 105 layers of width 20,480, 128 heads.

Command:   flax-transformers prepare megatron_530b
           flax-transformers train megatron_530b --workdir gs://bucket/megatron_530b
Hardware:  a TPU v5p slice of 2,048 chips, 8x16x16; the paper used 4,480 A100
Data:      as llama3_8b.py, with a byte-level BPE of GPT-2's size
Expected:  not run
Planned:   not run. --topology v5p:8x16x16: 50.5 of 95.7 GiB per chip, a step time of at least 16.4
           s, an MFU of at most 81.5 %

Learning rate, batch (1,920 sequences of 2,048 tokens, without ramp) and number of tokens (270
billion) are the paper's. Differences: parameters are sharded over all chips instead of pipeline
parallelism, and the vocabulary is trained on the corpus.
"""

import dataclasses

import llama3_8b  # recipes may import others of their folder

from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import Phase, TrainConfig

SEQUENCES, LENGTH, TOKENS = 1920, 2048, 270e9
STEPS = round(TOKENS / (SEQUENCES * LENGTH))


def get_config() -> TrainConfig:
    config = llama3_8b.get_config()
    return dataclasses.replace(
        config,
        model=GPT2Config(
            hidden_size=20480,
            num_layers=105,
            num_heads=128,
            intermediate_size=81920,
            max_positions=LENGTH,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        objective=CausalLM(attend_across=True),
        data=llama3_8b.web_text("byte_level_bpe", vocab_size=50_257),
        optimizer=AdamW(
            learning_rate=5e-5,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            no_decay=("bias", "scale"),
            schedule=Schedule(
                "cosine", warmup_steps=round(1e9 / (SEQUENCES * LENGTH)), end_fraction=0.1
            ),
        ),
        phases=(Phase(steps=STEPS, sequence_length=LENGTH, batch_size=SEQUENCES, micro_batches=3),),
        mesh=MeshConfig(data=1, fsdp=128, tensor=16),
    )
