"""ViT-H/14 on ImageNet: the recipe of vit_s16_imagenet2012.py with 32 layers of width 1,280.

Command:   flax-transformers prepare vit_h14_imagenet2012
           flax-transformers train vit_h14_imagenet2012 --workdir gs://bucket/vit_h14
Data:      as vit_s16_imagenet2012.py
Hardware:  a TPU v5e slice of 64 chips, 8x8
Expected:  not run; training a model of this size from scratch needs more images or more
           regularisation
Planned:   not run. --topology v5e:8x8: 2.1 of 15.75 GiB per chip, a step time of at least 0.101 s,
           an MFU of at most 80.6 %

Cannot be exported: the ViT of transformers classifies from the class token, and this model from the
mean of all patches.
"""

import dataclasses

import vit_s16_imagenet2012  # recipes may import others of their folder

from flax_transformers.families.vit import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import TrainConfig


def get_config() -> TrainConfig:
    config = vit_s16_imagenet2012.get_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            SIZES["vit-h14"],
            pooling="average",
            positions="sincos_2d",
            norm_eps=1e-6,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        mesh=MeshConfig(data=-1, fsdp=8),
        compute=ComputeConfig("auto", remat="full"),
    )
