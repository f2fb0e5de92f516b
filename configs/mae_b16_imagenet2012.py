"""MAE, ViT-B/16, on ImageNet for 800 epochs (arXiv:2111.06377).

Command:   flax-transformers prepare mae_b16_imagenet2012
           flax-transformers train mae_b16_imagenet2012 --workdir runs/mae_b16
Data:      as vit_s16_imagenet2012.py; labels are not used
Hardware:  one host with 8 accelerators. TPU v5e chips need phases.0.micro_batches: 45.0 of 15.75
           GiB without (planned)
Expected:  83.3 % top-1 after fine-tuning on the labels (published; not run). samples/ in the
           workdir shows the reconstructions.

Three quarters of the patches are masked and the encoder gets the others. Each target patch is
normalised to mean 0 and variance 1. Crops and flips are the only augmentation.
"""

import dataclasses

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.families.mae import SIZES
from flax_transformers.objectives.masked_image import MaskedImage
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, ImagePhase, TrainConfig

BATCH = 4096
EPOCH = 1_281_167 // BATCH


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(
            SIZES["mae-base"],
            norm_eps=1e-6,
            norm_pix_loss=True,
            dropout=0.0,
            attention_dropout=0.0,
        ),
        objective=MaskedImage(),
        data=ImageData(
            source=ImageSource("tfds:imagenet2012"),
            augmentation=Augmentation(crop="resized", scale=(0.2, 1.0), flip=0.5),
            workers=64,
        ),
        optimizer=AdamW(
            learning_rate=1.5e-4 * BATCH / 256,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.05,
            max_grad_norm=None,
            schedule=Schedule("cosine", warmup_steps=40 * EPOCH),
        ),
        phases=(ImagePhase(steps=800 * EPOCH, image_size=224, batch_size=BATCH),),
        checkpoints=CheckpointConfig(every_steps=2500),
        evaluation=Evaluation(every_steps=5000, batch_size=1024),
    )
