"""A ViT that classifies handwritten digits from smaller patches, trained with Muon.

Command:   flax-transformers train vit_mnist_muon --workdir runs/vit_mnist_muon \\
               --data.source.path MNIST
           where MNIST is the folder that contains train-images-idx3-ubyte.gz and the other files
Hardware:  2 CPU cores, 54 minutes on one of them (measured while other jobs ran)
Expected:  accuracy 99.38 % on the 10,000 test images (measured, one seed); vit_mnist.py has 98.6 %,
           the most frequent class 11.3 %

The model of vit_mnist.py with patches of 4 x 4 pixels and fixed sinusoidal positions, which learn
faster in the first epochs (studies/image_positions.py). After 6,000 of the steps it has 98.99 %,
and one with AdamW, learned positions and stochastic depth, not trained on, 98.72 % (one seed each).

Cannot be exported: ViT in transformers has learned positions.
"""

from dataclasses import replace
from typing import Any

import vit_mnist

from flax_transformers.optim.optimizers import Muon
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import TrainConfig


def get_config() -> TrainConfig:
    base = vit_mnist.get_config()
    model: Any = base.model
    return replace(
        base,
        model=replace(model, patch_size=4, positions="sincos_2d"),
        optimizer=Muon(
            learning_rate=4e-3, weight_decay=0.05, schedule=Schedule("cosine", warmup_steps=100)
        ),
        phases=(replace(base.phases[0], steps=8000),),
    )
