"""A small VideoMAE that reconstructs moving digits from a fifth of their tubelets.

Command:   flax-transformers train videomae_digits --workdir runs/videomae_digits \\
               --data.sources.0.path MNIST
           where MNIST is the folder that contains train-images-idx3-ubyte.gz and the other files
Hardware:  2 CPU cores
Expected:  not measured

The videos are generated from the digits: 8 frames in which a digit moves and bounces. The loss is
the squared error of pixels in [0, 1] on the masked tubelets.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.signals.dataset import SignalData
from flax_transformers.data.signals.generated import MovingDigits
from flax_transformers.families.videomae import VideoMaeConfig
from flax_transformers.objectives.videos import MaskedVideo
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, ImagePhase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=VideoMaeConfig(
            image_size=28,
            patch_size=4,
            num_channels=1,
            num_frames=8,
            hidden_size=64,
            num_layers=3,
            num_heads=4,
            intermediate_size=256,
            norm_eps=1e-6,
            init_std=0.1,
            final_norm=True,
            mask_ratio=0.8,
            norm_pix_loss=False,
            decoder_hidden_size=64,
            decoder_layers=1,
            decoder_heads=2,
            decoder_intermediate_size=256,
        ),
        objective=MaskedVideo(mean=(0.05,), std=(0.2,)),
        data=SignalData(sources=(MovingDigits(name="video", path="data/mnist"),)),
        optimizer=AdamW(
            learning_rate=2e-3,
            b2=0.95,
            weight_decay=0.05,
            schedule=Schedule("cosine", warmup_steps=100),
        ),
        phases=(ImagePhase(steps=400, image_size=28, batch_size=32),),
        checkpoints=CheckpointConfig(every_steps=400),
        evaluation=Evaluation(every_steps=0, batch_size=100),
        seed=0,
    )
