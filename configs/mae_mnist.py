"""A small masked autoencoder that reconstructs handwritten digits from a quarter of their patches.

Command:   flax-transformers train mae_mnist --workdir runs/mae_mnist \\
               --data.source.path MNIST
           where MNIST is the folder that contains train-images-idx3-ubyte.gz and the other files
Hardware:  2 CPU cores, 3 minutes (measured while other jobs ran)
Expected:  squared error on the masked patches of the 10,000 test images 0.411 (measured, one seed);
           baselines: 0.711 for the mean image, 1.015 for the mean patch. samples/ shows digits,
           visible patches and reconstructions (docs/mae_mnist.png). See mae_mnist_labels for
           fine-tuning

Images have three equal channels because the image-feature-extraction pipeline of transformers
converts images to RGB.

The loss is the squared error of pixels standardised over the data set. Patches are not normalised
one by one (norm_pix_loss), so that the loss can be compared with the baselines.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.families.mae import MaeConfig
from flax_transformers.objectives.masked_image import MaskedImage
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, ImagePhase, TrainConfig

MEAN, STD = 0.1307, 0.3081  # of the training images


def get_config() -> TrainConfig:
    return TrainConfig(
        model=MaeConfig(
            image_size=28,
            patch_size=4,
            num_channels=3,
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
        objective=MaskedImage(mean=(MEAN,), std=(STD,)),
        data=ImageData(source=ImageSource("data/mnist"), channels=3, crop_fraction=1.0),
        optimizer=AdamW(
            learning_rate=2e-3,
            b2=0.95,
            weight_decay=0.05,
            schedule=Schedule("cosine", warmup_steps=200),
        ),
        phases=(ImagePhase(steps=2000, image_size=28, batch_size=64),),
        checkpoints=CheckpointConfig(every_steps=1000),
        evaluation=Evaluation(every_steps=500, batch_size=250),
        seed=0,
    )
