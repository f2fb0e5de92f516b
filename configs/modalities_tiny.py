"""One small trunk for digits, moving digits, spoken-like tones and bytes of text.

Command:   flax-transformers train modalities_tiny --workdir runs/modalities \\
               --data.sources.0.path MNIST --data.sources.1.path MNIST
           where MNIST is the folder that contains train-images-idx3-ubyte.gz and the other files.
           With --objective.modalities image the same model learns images alone
Hardware:  2 CPU cores, 5 to 8 minutes (measured while other jobs ran)
Expected:  errors on 500 held-out arrays of each: image 0.64 to 0.65, video 0.72 to 0.82, audio
           0.22 to 0.23, text 3.22 to 3.24 nats (measured, 3 seeds); baselines: 0.714, 0.836 and
           0.573 for the mean array, 3.317 for the frequencies of bytes

Videos and tones are generated, the text is the one that comes with Python. Errors are squared ones
of standardised values, and for text the cross-entropy of bytes in nats. See modalities_tiny_labels
for fine-tuning.

Cannot be exported: transformers has no class for several modalities with one trunk.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.signals.dataset import SignalData
from flax_transformers.data.signals.generated import MovingDigits, Tones
from flax_transformers.data.signals.sources import Digits, EmbeddedBytes
from flax_transformers.families.multimodal_mae import (
    ByteModality,
    GridModality,
    MultimodalMaeConfig,
)
from flax_transformers.objectives.modalities import MaskedModalities
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Phase, TrainConfig

MODEL = MultimodalMaeConfig(
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    intermediate_size=256,
    init_std=0.1,
    num_labels=10,
    modalities=(
        GridModality(name="image", size=(28, 28), patch=(4, 4), mean=33.3, std=78.6),
        GridModality(
            name="video",
            size=(8, 28, 28),
            patch=(2, 4, 4),
            mean=8.3,
            std=39.0,
            mask_ratio=0.8,
            tubes=True,
        ),
        GridModality(name="audio", size=(48, 32), patch=(8, 4), mean=0.6, std=3.7),
        ByteModality(name="text", length=64),
    ),
    decoder_hidden_size=32,
    decoder_layers=1,
    decoder_heads=2,
    decoder_intermediate_size=128,
)


def get_config() -> TrainConfig:
    return TrainConfig(
        model=MODEL,
        objective=MaskedModalities(modalities=("image", "video", "audio", "text")),
        data=SignalData(
            sources=(
                Digits(name="image", path="data/mnist"),
                MovingDigits(name="video", path="data/mnist"),
                Tones(name="audio", examples=4000, held_out=1000),
                EmbeddedBytes(name="text", length=64),
            )
        ),
        optimizer=AdamW(
            learning_rate=2e-3,
            b2=0.95,
            weight_decay=0.05,
            schedule=Schedule("cosine", warmup_steps=40),
        ),
        phases=(
            # 49 + 196 + 48 + 64 tokens in a row.
            Phase(steps=1200, sequence_length=357, batch_size=16),
        ),
        checkpoints=CheckpointConfig(every_steps=1200),
        evaluation=Evaluation(every_steps=0, batch_size=100, max_examples=500),
        seed=0,
    )
