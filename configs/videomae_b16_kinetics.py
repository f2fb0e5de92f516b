"""VideoMAE, ViT-B/16 on 16 frames, on Kinetics-400 for 800 epochs (arXiv:2203.12602).

Command:   flax-transformers train videomae_b16_kinetics --workdir runs/videomae_b16
Data:      data/kinetics400/train.npy, clips uint8 [n, 16, 224, 224, 3] of every fourth frame of the
           videos, already decoded and cropped; it is mapped into memory
Hardware:  a TPU v5e slice of 16 chips, 4x4
Expected:  80.0 % top-1 after fine-tuning on the labels (published; not run)
Planned:   not run. --topology v5e:4x4: 11.0 of 15.75 GiB per chip, a step time of at least
           0.100 s, an MFU of at most 68.8 %; in one micro-batch it does not fit

Nine tenths of the tubes are masked. Each channel of a target tubelet is normalised to mean 0 and
variance 1. The paper crops and flips clips at random; here that is done when they are written.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.signals.dataset import SignalData
from flax_transformers.data.signals.sources import ArraySource
from flax_transformers.families.videomae import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.videos import MaskedVideo
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import Evaluation, ImagePhase, TrainConfig

BATCH = 1024
EPOCH = 240_436 // BATCH


def get_config() -> TrainConfig:
    return TrainConfig(
        model=SIZES["videomae-base"],
        objective=MaskedVideo(),
        data=SignalData(
            sources=(
                ArraySource(name="video", path="data/kinetics400", array_shape=(16, 224, 224, 3)),
            ),
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
        phases=(ImagePhase(steps=800 * EPOCH, image_size=224, batch_size=BATCH, micro_batches=2),),
        mesh=MeshConfig(data=-1),
        compute=ComputeConfig(dtype="auto", remat="dots"),
        checkpoints=CheckpointConfig(every_steps=2500),
        evaluation=Evaluation(every_steps=0, batch_size=256),
    )
