"""A ViT of 22 billion parameters with the shape of arXiv:2302.05442: 48 layers of width 6,144.

Command:   flax-transformers prepare configs/vit_22b_imagenet2012.py
           flax-transformers train configs/vit_22b_imagenet2012.py --workdir gs://bucket/vit_22b
Data:      as vit_s16_imagenet2012.py; the paper's 4 billion images are not public
Hardware:  a TPU v5e slice of 256 chips, 16x16
Expected:  not run. 1.3 million images are too few for a model of this size; the recipe exists to
           plan and measure a training step.
Planned:   not run. --topology v5e:16x16: 14.9 of 15.75 GiB per chip, a step time of at least 3.35
           s, an MFU of at most 81.5 %

Differences from the paper: attention and feed-forward layers are sequential instead of parallel;
queries and keys are not normalised and have biases; the classifier gets the mean of all patches
instead of attention pooling; batches of 4,096 instead of 65,536.

Cannot be exported: the ViT of transformers classifies from the class token, and this model from the
mean of all patches.
"""

import dataclasses

import vit_h14_imagenet2012  # recipes may import others of their folder

from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import ImagePhase, TrainConfig


def get_config() -> TrainConfig:
    config = vit_h14_imagenet2012.get_config()
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, hidden_size=6144, num_layers=48, num_heads=48, intermediate_size=24576
        ),
        phases=(ImagePhase(steps=177_000, image_size=224, batch_size=4096),),
        mesh=MeshConfig(data=-1, fsdp=32),
    )
