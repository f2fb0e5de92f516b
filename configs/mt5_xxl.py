"""mT5 XXL on mC4: 13 billion parameters, 101 languages (arXiv:2010.11934).

Command:   flax-transformers prepare mt5_xxl
           flax-transformers train mt5_xxl --workdir gs://bucket/mt5_xxl
Hardware:  a TPU v5e slice of 256 chips, 16x16; the width of 4,096 is sharded into parts of 128
Data:      as mt5_small_mc4.py, and the same token store
Expected:  not run
Planned:   not run. --topology v5e:16x16: 7.3 of 15.75 GiB per chip, a step time of at least 1.14 s,
           an MFU of at most 77.9 %
"""

import dataclasses

import mt5_small_mc4  # recipes may import others of their folder

from flax_transformers.families.t5 import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(
        mt5_small_mc4.get_config(),
        model=dataclasses.replace(
            SIZES["mt5-xxl"], dropout=0.0, attention_dropout=0.0, activation_dropout=0.0
        ),
        mesh=MeshConfig(data=-1, fsdp=32),
        compute=ComputeConfig("auto", remat="full"),
    )
