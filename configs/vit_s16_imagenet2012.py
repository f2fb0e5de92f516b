"""ViT-S/16 on ImageNet in 90 epochs: the plain baseline of arXiv:2205.01580.

Command:   flax-transformers prepare vit_s16_imagenet2012
           flax-transformers train vit_s16_imagenet2012 --workdir runs/vit_s16
Data:      "tfds:imagenet2012", prepared by TFDS with the ``prepare`` extra after a manual download,
           or a folder of train/CLASS/*.JPEG and val/CLASS/*.JPEG as --data.source.path
Hardware:  one host with 8 accelerators
Expected:  76.5 % top-1 on the validation images (published; not run)

Average pooling, fixed sine-cosine positions, RandAugment and mixup of 0.2. Mixup draws a
coefficient for each image; the original draws one for each batch. Weight decay here is multiplied
by the learning rate and in the original it is not: 0.1 here equals 1e-4 there at the peak learning
rate.

Cannot be exported: the ViT of transformers classifies from the class token, and this model from the
mean of all patches.
"""

import dataclasses

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.families.vit import SIZES
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, ImagePhase, TrainConfig

BATCH = 1024
STEPS = 90 * 1_281_167 // BATCH


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(
            SIZES["vit-s16"],
            pooling="average",
            positions="sincos_2d",
            norm_eps=1e-6,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        objective=ImageClassification(mean=(0.5,), std=(0.5,), mixup=0.2),
        data=ImageData(
            source=ImageSource("tfds:imagenet2012"),
            augmentation=Augmentation(
                crop="resized",
                scale=(0.05, 1.0),
                flip=0.5,
                policy="rand_augment",
                layers=2,
                magnitude=10.0,
            ),
            workers=32,
        ),
        optimizer=AdamW(
            learning_rate=1e-3,
            weight_decay=0.1,
            eps=1e-8,
            schedule=Schedule("cosine", warmup_steps=10_000),
        ),
        phases=(ImagePhase(steps=STEPS, image_size=224, batch_size=BATCH),),
        checkpoints=CheckpointConfig(every_steps=2500),
        evaluation=Evaluation(every_steps=2500, batch_size=BATCH),
    )
