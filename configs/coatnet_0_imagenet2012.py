"""CoAtNet-0 on ImageNet in 300 epochs, after table 12 of arXiv:2106.04803.

Command:   flax-transformers prepare coatnet_0_imagenet2012
           flax-transformers train coatnet_0_imagenet2012 --workdir runs/coatnet_0
Data:      "tfds:imagenet2012", prepared by TFDS with the ``prepare`` extra after a manual download,
           or a folder of train/CLASS/*.JPEG and val/CLASS/*.JPEG as --data.source.path
Hardware:  a TPU v5e slice of 16 chips, 4x4
Expected:  81.6 % top-1 on the validation images (published; not run)
Planned:   not run. --topology v5e:4x4: 13.4 of 15.75 GiB per chip, a step time of at least
           0.401 s, an MFU of at most 8.8 %: it is bound by memory bandwidth

Batch norm uses the statistics of groups of 32 images, whatever the slice; the paper does not say
over how many images it takes them. Its magnitude of RandAugment, 15, is 10 here, the largest.
"""

import dataclasses

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.families.coatnet import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.optim.ema import EMAConfig
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import Evaluation, ImagePhase, TrainConfig

BATCH = 4096
EPOCH = 1_281_167 // BATCH


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(SIZES["coatnet-0"], drop_path=0.2),
        objective=ImageClassification(mean=(0.5,), std=(0.5,), mixup=0.8, label_smoothing=0.1),
        data=ImageData(
            source=ImageSource("tfds:imagenet2012"),
            augmentation=Augmentation(
                crop="resized", flip=0.5, policy="rand_augment", layers=2, magnitude=10.0
            ),
            workers=32,
        ),
        optimizer=AdamW(
            learning_rate=1e-3,
            weight_decay=0.05,
            max_grad_norm=1.0,
            schedule=Schedule("cosine", warmup_steps=10_000, end_fraction=0.01),
        ),
        phases=(ImagePhase(steps=300 * EPOCH, image_size=224, batch_size=BATCH, micro_batches=2),),
        mesh=MeshConfig(data=-1),
        compute=ComputeConfig(dtype="auto", remat="dots"),
        ema=EMAConfig(0.9999),
        checkpoints=CheckpointConfig(every_steps=2500),
        evaluation=Evaluation(every_steps=2500, batch_size=1024),
        seed=0,
    )
