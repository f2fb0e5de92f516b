"""The shape of PaLM 540B (arXiv:2204.02311): 118 layers of width 18,432, 48 heads of 256.

Command:   flax-transformers prepare palm_540b
           flax-transformers train palm_540b --workdir gs://bucket/palm_540b
Hardware:  a TPU v5p slice of 2,048 chips, 8x16x16; the paper used two slices of 3,072 v4 chips
Data:      as llama3_8b.py, with a vocabulary of 256,000
Expected:  not run
Planned:   not run. --topology v5p:8x16x16: 50.6 of 95.7 GiB per chip, a step time of at least 17.8
           s, an MFU of at most 81.9 %

The published architecture: attention and feed-forward side by side behind one norm without bias,
SwiGLU, rotary positions, multi-query attention (one key/value head), tied embeddings, no biases,
Adafactor with a learning rate of 1e-2 that decays as 1 / sqrt(step) after 10,000 steps, gradients
clipped at a norm of 1, and a z-loss of 1e-4. Its block is that of Command R (families/cohere.py).
Differences from the paper: batches of 2,048 sequences from the start, where it begins with 512;
Adafactor has no momentum, and factored second moments; weights do not decay, which they do there by
the square of the learning rate.
"""

import dataclasses

import llama3_8b  # recipes may import others of their folder

from flax_transformers.families.cohere import CohereConfig
from flax_transformers.models.config import Rope
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.optim.optimizers import Adafactor
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import Phase, TrainConfig


def get_config() -> TrainConfig:
    config = llama3_8b.get_config()
    return dataclasses.replace(
        config,
        model=CohereConfig(
            vocab_size=256_000,
            hidden_size=18432,
            num_layers=118,
            num_heads=48,
            num_key_value_heads=1,
            head_dim=256,
            intermediate_size=73728,
            logit_scale=18432**-0.5,
            norm_eps=1e-6,
            rope=Rope(interleaved=True),
            pad_id=0,
            bos_id=None,
            eos_ids=(1,),
        ),
        objective=CausalLM(z_loss=1e-4),
        data=llama3_8b.web_text("bpe", vocab_size=256_000),
        optimizer=Adafactor(max_grad_norm=1.0),
        phases=(Phase(steps=255_000, sequence_length=2048, batch_size=2048),),
        mesh=MeshConfig(data=-1, fsdp=128),
        evaluation=dataclasses.replace(config.evaluation, batch_size=2048),
    )
