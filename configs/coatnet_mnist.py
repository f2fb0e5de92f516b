"""A small CoAtNet that classifies handwritten digits, for few labels.

Command:   flax-transformers train coatnet_mnist --workdir runs/coatnet_mnist \\
               --data.source.path MNIST
           where MNIST is the folder that contains train-images-idx3-ubyte.gz and the other files
Hardware:  2 CPU cores, 9 minutes (measured while other jobs ran)
Expected:  accuracy 96.2, 96.2 and 96.0 % on the 10,000 test images (seeds 0, 1 and 2); a ViT of
           equal size has 85.5, 86.3 and 84.9 %, the most frequent class 11.3 %

By default it learns from 60 labels of each digit, 1 % of the training images. The map is halved
twice only, to 7 x 7 positions for attention. Cannot be exported: the CoAtNet of timm halves it in
the stem and in every stage.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.families.coatnet import CoAtNetConfig
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, ImagePhase, TrainConfig

MEAN, STD = 0.1307, 0.3081  # of the training images


def get_config() -> TrainConfig:
    return TrainConfig(
        model=CoAtNetConfig(
            image_size=28,
            num_channels=3,
            num_labels=10,
            stem_widths=(16, 16),
            stage_widths=(24, 48, 64, 64),
            stage_depths=(1, 2, 2, 1),
            strides=(2, 1, 2, 1, 1),
            head_dim=16,
            init_std=0.1,
        ),
        objective=ImageClassification(mean=(MEAN,), std=(STD,)),
        data=ImageData(
            source=ImageSource("data/mnist"),
            channels=3,
            crop_fraction=1.0,
            augmentation=Augmentation(crop="shift", padding=2),
            examples_per_class=60,
        ),
        optimizer=AdamW(
            learning_rate=2e-3,
            weight_decay=0.05,
            schedule=Schedule("cosine", warmup_steps=50),
        ),
        phases=(ImagePhase(steps=500, image_size=28, batch_size=64),),
        checkpoints=CheckpointConfig(every_steps=500),
        evaluation=Evaluation(every_steps=500, batch_size=250),
        seed=0,
    )
