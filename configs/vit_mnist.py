"""A small ViT that classifies handwritten digits.

Command:   flax-transformers train vit_mnist --workdir runs/vit_mnist \\
               --data.source.path MNIST
           where MNIST is the folder that contains train-images-idx3-ubyte.gz and the other files
Hardware:  2 CPU cores, 12 minutes (measured while other jobs ran)
Expected:  accuracy 98.6 % on the 10,000 test images (measured, one seed, 2 CPU cores); the most
           frequent class has 11.3 %

The model has a class token and images have three equal channels, so that the image-classification
pipeline of transformers can run the exported model.

Patches are 7 x 7 pixels: with 4 x 4 a step takes four times as long (205 ms instead of 51). Weights
are initialised with a standard deviation of 0.1; the usual 0.02 is for models that are 12 times as
wide.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.families.vit import ViTConfig
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, ImagePhase, TrainConfig

MEAN, STD = 0.1307, 0.3081  # of the training images


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ViTConfig(
            image_size=28,
            patch_size=7,
            num_channels=3,
            num_labels=10,
            hidden_size=64,
            num_layers=4,
            num_heads=4,
            intermediate_size=256,
            norm_eps=1e-6,
            dropout=0.0,
            attention_dropout=0.0,
            init_std=0.1,
        ),
        objective=ImageClassification(mean=(MEAN,), std=(STD,)),
        data=ImageData(
            source=ImageSource("data/mnist"),
            channels=3,
            crop_fraction=1.0,
            augmentation=Augmentation(crop="shift", padding=2),
        ),
        optimizer=AdamW(
            learning_rate=2e-3,
            weight_decay=0.05,
            schedule=Schedule("cosine", warmup_steps=200),
        ),
        phases=(ImagePhase(steps=4000, image_size=28, batch_size=64),),
        checkpoints=CheckpointConfig(every_steps=2000),
        evaluation=Evaluation(every_steps=1000, batch_size=250),
        seed=0,
    )
