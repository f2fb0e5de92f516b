"""Few labels: a ViT pretrained as a masked autoencoder, and the same one from random weights.

Command:   flax-transformers sweep studies/few_labels.py --workdir runs/few_labels \\
               --data.source.path MNIST
           where MNIST is the folder that contains train-images-idx3-ubyte.gz and the other files
Data:      MNIST: pretraining on 60,000 images, labels of 1 % or 10 % of them, scored on 10,000
Hardware:  2 CPU cores, 24 minutes by two processes (measured while other jobs ran)
Result:    docs/results/few_labels.md: MAE far ahead; DeiT III's regularisation does not help
Size:      5 variants x 3 seeds, a ViT of 3 layers, 64 wide: 2,000 steps of pretraining, and 600 on
           labels

The recipes mae_mnist and mae_mnist_labels, each variant of which takes as many steps on labels.
``scratch_10_percent_mixed`` adds what DeiT III trains with (arXiv:2204.07118) and digits keep their
meaning under: mixup, CutMix, binary cross-entropy and stochastic depth.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import flax_transformers as ft
from flax_transformers.sweeps.study import Study
from flax_transformers.training.config import Evaluation, TrainConfig

ONE_PERCENT, TEN_PERCENT = 60, 600
"""Images of each digit."""
STEPS = 600


def on_labels(
    config: TrainConfig, workdir: str = "", *, per_class: int, mixed: bool = False
) -> TrainConfig:
    """Classification with labels of ``per_class`` images of each digit of the config's data."""
    labels: Any = ft.recipe("mae_mnist_labels")
    images: Any = config.data
    if mixed:
        labels = replace(
            labels,
            model=replace(labels.model, drop_path=0.1),
            objective=replace(labels.objective, loss="sigmoid", mixup=0.8, cutmix=1.0),
        )
    return replace(
        labels,
        data=replace(labels.data, source=images.source, examples_per_class=per_class),
        phases=(replace(labels.phases[0], steps=STEPS),),
        checkpoints=replace(labels.checkpoints, every_steps=STEPS),
        logging=config.logging,
    )


def from_random_weights(per_class: int, mixed: bool = False) -> Callable[..., TrainConfig]:
    """A variant without pretraining; no part is nearer to its final values than another."""

    def variant(base: TrainConfig) -> TrainConfig:
        config: Any = on_labels(base, per_class=per_class, mixed=mixed)
        return replace(config, optimizer=replace(config.optimizer, layer_decay=1.0))

    return variant


def get_study() -> Study:
    pretraining = ft.recipe("mae_mnist")
    return Study(
        base=replace(
            pretraining,
            evaluation=Evaluation(every_steps=0, batch_size=250),
            logging=replace(pretraining.logging, every_steps=50, tensorboard=False),
        ),
        variants={
            "scratch_1_percent": from_random_weights(ONE_PERCENT),
            "mae_1_percent": {},
            "scratch_10_percent": from_random_weights(TEN_PERCENT),
            "mae_10_percent": {},
            "scratch_10_percent_mixed": from_random_weights(TEN_PERCENT, mixed=True),
        },
        seeds=3,
        metric="eval/accuracy",
        fine_tune={
            "mae_1_percent": partial(on_labels, per_class=ONE_PERCENT),
            "mae_10_percent": partial(on_labels, per_class=TEN_PERCENT),
        },
        published=(
            "top-1 accuracy of ViT-L on ImageNet with all labels: 82.5 from random weights, 84.9 "
            "after MAE; ViT-B from random weights 81.8 with DeiT's regularisation, 83.8 with DeiT "
            "III's"
        ),
        citation="He et al., Masked Autoencoders, arXiv:2111.06377; DeiT III, arXiv:2204.07118",
        expected=(
            ("mae_1_percent", "scratch_1_percent"),
            ("mae_10_percent", "scratch_10_percent"),
            ("scratch_10_percent_mixed", "scratch_10_percent"),
        ),
    )
