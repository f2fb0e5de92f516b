"""Fine-tune the encoder of mae_mnist on a few labels of each digit.

Command:   flax-transformers train mae_mnist_labels --workdir runs/mae_labels \\
               --data.source.path MNIST --init-from runs/mae_mnist --data.examples-per-class 10
           where MNIST is the folder of mae_mnist.py, and runs/mae_mnist its workdir.
           Without --init-from the same model is trained from random weights
Hardware:  2 CPU cores, 70 seconds (measured while other jobs ran)
Expected:  accuracy on the 10,000 test images with 10 and 60 labels of each digit: 88.3 and 94.2 %,
           from random weights 66.1 and 69.8 % after as many steps (measured, one seed)

Cannot be exported: transformers has no classifier on a masked autoencoder.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.families.mae import MaeConfig
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, ImagePhase, TrainConfig

MEAN, STD = 0.1307, 0.3081  # of the training images


def get_config() -> TrainConfig:
    return TrainConfig(
        model=MaeConfig(
            architecture="ViTMAEForImageClassification",
            image_size=28,
            patch_size=4,
            num_channels=3,
            num_labels=10,
            hidden_size=64,
            num_layers=3,
            num_heads=4,
            intermediate_size=256,
            norm_eps=1e-6,
            dropout=0.0,
            attention_dropout=0.0,
            init_std=0.1,
            decoder_hidden_size=64,
            decoder_layers=1,
            decoder_heads=2,
            decoder_intermediate_size=256,
        ),
        objective=ImageClassification(mean=(MEAN,), std=(STD,)),
        data=ImageData(
            source=ImageSource("data/mnist"),
            channels=3,
            crop_fraction=1.0,
            augmentation=Augmentation(crop="shift", padding=2),
        ),
        optimizer=AdamW(
            learning_rate=1e-3,
            weight_decay=0.05,
            layer_decay=0.75,
            schedule=Schedule("cosine", warmup_steps=50),
        ),
        phases=(ImagePhase(steps=400, image_size=28, batch_size=50),),
        checkpoints=CheckpointConfig(every_steps=400),
        evaluation=Evaluation(every_steps=0, batch_size=250),
        seed=0,
    )
