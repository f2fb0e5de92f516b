"""ViT-22B (arXiv:2302.05442): 48 parallel layers of width 6,144, with normalised queries and keys.

Command:   flax-transformers prepare vit_22b_imagenet2012
           flax-transformers train vit_22b_imagenet2012 --workdir gs://bucket/vit_22b
Data:      as vit_s16_imagenet2012.py; the paper's 4 billion images are not public
Hardware:  a TPU v5e slice of 256 chips, 16x16
Expected:  not run. 1.3 million images are too few for a model of this size; the recipe exists to
           plan and measure a training step.
Planned:   not run. --topology v5e:16x16: 14.8 of 15.75 GiB per chip, a step time of at least 3.28
           s, an MFU of at most 83.5 %

Differences from the paper: batches of 4,096 instead of 65,536, and the loss, the optimizer with its
schedule and decay, and the augmentation of vit_s16_imagenet2012.py.

Cannot be exported: the ViT of transformers has no such layers, norms and pooling.
"""

import dataclasses

import vit_h14_imagenet2012  # recipes may import others of their folder

from flax_transformers.families.vit import VIT_22B
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import ImagePhase, TrainConfig


def get_config() -> TrainConfig:
    config = vit_h14_imagenet2012.get_config()
    return dataclasses.replace(
        config,
        model=VIT_22B,
        phases=(ImagePhase(steps=177_000, image_size=224, batch_size=4096),),
        mesh=MeshConfig(data=-1, fsdp=32),
    )
