"""ByT5 XXL: 13 billion parameters on bytes, 36 encoder layers (arXiv:2105.13626).

Command:   flax-transformers prepare byt5_xxl
           flax-transformers train byt5_xxl --workdir gs://bucket/byt5_xxl
Hardware:  a TPU v5e slice of 256 chips, 16x16; the width of 4,672 is sharded into parts of 146
Data:      as byt5_small.py, and the same token store
Expected:  not run
Planned:   not run. --topology v5e:16x16: 8.5 of 15.75 GiB per chip, a step time of at least 1.66 s,
           an MFU of at most 78.2 %
"""

import dataclasses

import byt5_small  # recipes may import others of their folder

from flax_transformers.families.t5 import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(
        byt5_small.get_config(),
        model=dataclasses.replace(
            SIZES["byt5-xxl"], dropout=0.0, attention_dropout=0.0, activation_dropout=0.0
        ),
        mesh=MeshConfig(data=-1, fsdp=32),
        compute=ComputeConfig("auto", remat="full"),
    )
