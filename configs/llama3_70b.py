"""Llama 3 70B from scratch (arXiv:2407.21783): llama3_8b.py with 80 layers of width 8,192.

Command:   flax-transformers prepare llama3_70b
           flax-transformers train llama3_70b --workdir gs://bucket/llama3_70b
Hardware:  a TPU v5p slice of 512 chips, 8x8x8; the width is sharded into parts of 128
Data:      as llama3_8b.py, and the same token store
Expected:  not run
Planned:   not run. --topology v5p:8x8x8: 31.0 of 95.7 GiB per chip, a step time of at least 10.3 s,
           an MFU of at most 77.8 %
"""

import dataclasses

import llama3_8b  # recipes may import others of their folder

from flax_transformers.families.llama import SIZES
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import TrainConfig


def get_config() -> TrainConfig:
    config = llama3_8b.get_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(SIZES["llama-3-70b"], pad_id=0, bos_id=None, eos_ids=(1,)),
        optimizer=dataclasses.replace(config.optimizer, learning_rate=1.5e-4),
        mesh=MeshConfig(data=-1, fsdp=64),
    )
