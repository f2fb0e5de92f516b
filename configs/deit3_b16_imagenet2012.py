"""DeiT III, B/16, on ImageNet: 800 epochs at 192 pixels, then 20 at 224 (arXiv:2204.07118).

Command:   flax-transformers prepare deit3_b16_imagenet2012
           flax-transformers train deit3_b16_imagenet2012 --workdir runs/deit3_b16
Data:      as vit_s16_imagenet2012.py
Hardware:  one host with 8 accelerators
Expected:  83.8 % top-1 on the validation images (published; not run)
Planned:   not run. --topology v5e:4x2, at 224 pixels: 15.2 of 15.75 GiB per chip, a step time of at
           least 0.281 s, an MFU of at most 48.7 %: it is bound by memory bandwidth

Binary cross-entropy per class, mixup and CutMix, 3-Augment, stochastic depth and LAMB. The second
phase has larger images; position embeddings are interpolated to the smaller grid in the first
phase.

Differences from the paper: the last 20 epochs there are a separate run with AdamW, a learning rate
of 1e-5 and RandAugment, and every image occurs three times per batch (repeated augmentation).
"""

import dataclasses

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.families.deit3 import SIZES
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.optim.optimizers import LAMB
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, ImagePhase, TrainConfig

BATCH = 2048
EPOCH = 1_281_167 // BATCH
NOT_DECAYED = ("bias", "scale", "embedding")  # nor scaled by their norm, as in the original


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(
            SIZES["deit3-b16"], drop_path=0.2, dropout=0.0, attention_dropout=0.0
        ),
        objective=ImageClassification(loss="sigmoid", mixup=0.8, cutmix=1.0),
        data=ImageData(
            source=ImageSource("tfds:imagenet2012"),
            crop_fraction=1.0,
            augmentation=Augmentation(
                crop="resized", flip=0.5, policy="three_augment", color_jitter=0.3
            ),
            workers=64,
        ),
        optimizer=LAMB(
            learning_rate=3e-3,
            weight_decay=0.05,
            no_decay=NOT_DECAYED,
            no_adaptation=NOT_DECAYED,
            schedule=Schedule("cosine", warmup_steps=5 * EPOCH),
        ),
        phases=(
            ImagePhase(steps=800 * EPOCH, image_size=192, batch_size=BATCH),
            ImagePhase(steps=20 * EPOCH, image_size=224, batch_size=BATCH, micro_batches=2),
        ),
        checkpoints=CheckpointConfig(every_steps=2500),
        evaluation=Evaluation(every_steps=5000, batch_size=BATCH),
    )
