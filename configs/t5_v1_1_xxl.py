"""T5 1.1 XXL on C4: 11 billion parameters (arXiv:1910.10683, arXiv:2002.05202).

Command:   flax-transformers prepare configs/t5_v1_1_xxl.py
           flax-transformers train configs/t5_v1_1_xxl.py --workdir gs://bucket/t5_v1_1_xxl
Hardware:  a TPU v5e slice of 256 chips, 16x16: shards of 128 of the width of 4,096
Data:      as t5_v1_1_base_c4.py, and the same token store
Expected:  not run
Planned:   not run; --topology v5e:16x16: 4.7 of 15.75 GiB on each chip, a step takes 1.09 s at
           least, MFU is 78.2 % at most
"""

import dataclasses

import t5_v1_1_base_c4  # a recipe may build on another in its folder

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
