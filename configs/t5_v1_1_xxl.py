"""T5 1.1 XXL on C4: 11 billion parameters (arXiv:1910.10683, arXiv:2002.05202).

Command:   flax-transformers prepare t5_v1_1_xxl
           flax-transformers train t5_v1_1_xxl --workdir gs://bucket/t5_v1_1_xxl
Hardware:  a TPU v5e slice of 256 chips, 16x16; the width of 4,096 is sharded into parts of 128
Data:      as t5_v1_1_base_c4.py, and the same token store
Expected:  not run
Planned:   not run. --topology v5e:16x16: 4.7 of 15.75 GiB per chip, a step time of at least 1.09 s,
           an MFU of at most 78.2 %
"""

import dataclasses

import t5_v1_1_base_c4  # recipes may import others of their folder

from flax_transformers.families.t5 import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(
        t5_v1_1_base_c4.get_config(),
        model=dataclasses.replace(
            SIZES["t5-v1_1-xxl"], dropout=0.0, attention_dropout=0.0, activation_dropout=0.0
        ),
        mesh=MeshConfig(data=-1, fsdp=32),
        compute=ComputeConfig("auto", remat="full"),
    )
