"""A ViT-L trunk for images, videos, spectrograms, depth maps, point clouds and bytes.

Command:   flax-transformers train modalities_l16 --workdir runs/modalities_l16
Data:      data/NAME/train.npy of each modality, arrays of the shapes below (see docs/images.md)
Hardware:  a TPU v5p slice of 32 chips, 4x4x2
Expected:  not run. The sizes are those of ViT-L/16 and OmniMAE (arXiv:2206.08356), spectrograms as
           in AudioMAE (arXiv:2207.06405), and points as in Point-MAE (arXiv:2203.06604)
Planned:   not run. --topology v5p:4x4x2: 19.4 of 95.7 GiB per chip, a step time of at least
           0.150 s, an MFU of at most 67.7 %

Cannot be exported: transformers has no class for several modalities with one trunk.
"""

from typing import Any

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.signals.dataset import SignalData
from flax_transformers.data.signals.sources import ArraySource
from flax_transformers.families import vit
from flax_transformers.families.multimodal_mae import (
    ByteModality,
    GridModality,
    MultimodalMaeConfig,
    PointModality,
)
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.modalities import MaskedModalities
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import Evaluation, Phase, TrainConfig

RGB: dict[str, Any] = {"channels": 3, "mean": 116.0, "std": 57.8, "norm_pix_loss": True}
"""Mean and standard deviation of the values of ImageNet's pixels, over all channels."""

MODALITIES = (
    GridModality(name="image", size=(224, 224), patch=(16, 16), **RGB),
    GridModality(
        name="video", size=(16, 224, 224), patch=(2, 16, 16), mask_ratio=0.9, tubes=True, **RGB
    ),
    GridModality(
        name="audio", size=(1024, 128), patch=(16, 16), mask_ratio=0.8, norm_pix_loss=True
    ),
    GridModality(name="depth", size=(224, 224), patch=(16, 16)),
    PointModality(name="points", points=1024, groups=64, group_size=32),
    ByteModality(name="text", length=512),
)


def get_config() -> TrainConfig:
    tokens = sum(one.tokens for one in MODALITIES)
    return TrainConfig(
        model=MultimodalMaeConfig(**vit.dimensions("l"), modalities=MODALITIES),
        objective=MaskedModalities(modalities=tuple(one.name for one in MODALITIES)),
        data=SignalData(
            sources=tuple(
                ArraySource(
                    name=one.name,
                    path=f"data/{one.name}",
                    array_shape=one.shape,
                    array_dtype="uint8" if one.name in ("image", "video", "text") else "float32",
                )
                for one in MODALITIES
            ),
            workers=64,
        ),
        optimizer=AdamW(
            learning_rate=6e-4,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.05,
            max_grad_norm=1.0,
            schedule=Schedule("cosine", warmup_steps=10_000),
        ),
        phases=(Phase(steps=200_000, sequence_length=tokens, batch_size=1024),),
        mesh=MeshConfig(data=1, fsdp=-1),
        compute=ComputeConfig(dtype="auto", remat="dots"),
        checkpoints=CheckpointConfig(every_steps=2500),
        evaluation=Evaluation(every_steps=0, batch_size=256),
    )
