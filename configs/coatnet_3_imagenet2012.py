"""CoAtNet-3 on ImageNet: the recipe of coatnet_0_imagenet2012.py with 168 million parameters.

Command:   flax-transformers prepare coatnet_3_imagenet2012
           flax-transformers train coatnet_3_imagenet2012 --workdir gs://bucket/coatnet_3
Data:      as coatnet_0_imagenet2012.py
Hardware:  a TPU v5e slice of 64 chips, 8x8
Expected:  84.5 % top-1 on the validation images (published; not run)
Planned:   not run. --topology v5e:8x8: 10.5 of 15.75 GiB per chip, a step time of at least
           0.305 s, an MFU of at most 23.3 %: it is bound by memory bandwidth
"""

import dataclasses

import coatnet_0_imagenet2012  # recipes may import others of their folder

from flax_transformers.families.coatnet import SIZES
from flax_transformers.training.config import TrainConfig


def get_config() -> TrainConfig:
    config = coatnet_0_imagenet2012.get_config()
    return dataclasses.replace(config, model=dataclasses.replace(SIZES["coatnet-3"], drop_path=0.7))
