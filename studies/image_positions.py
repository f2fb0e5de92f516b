"""Positions of a ViT's patches: by number, by row and column, and fixed sinusoids.

Command:   flax-transformers sweep studies/image_positions.py --workdir runs/image_positions \\
               --data.source.path MNIST
           where MNIST is the folder that contains train-images-idx3-ubyte.gz and the other files
Data:      MNIST, 60,000 training images, scored on the 10,000 test images
Hardware:  2 CPU cores, 14 minutes by two processes (measured while other jobs ran)
Result:    docs/results/image_positions.md: learned positions are equal, as published
Size:      3 variants x 3 seeds, a ViT of 4 layers, 64 wide, 49 patches, 600 steps
"""

from dataclasses import replace
from typing import Any

import flax_transformers as ft
from flax_transformers.sweeps.study import Study
from flax_transformers.training.config import Evaluation


def get_study() -> Study:
    whole: Any = ft.recipe("vit_mnist")
    return Study(
        base=replace(
            whole,
            model=replace(whole.model, patch_size=4),
            phases=(replace(whole.phases[0], steps=600),),
            checkpoints=replace(whole.checkpoints, every_steps=600),
            evaluation=Evaluation(every_steps=0, batch_size=250),
            logging=replace(whole.logging, every_steps=50, tensorboard=False),
        ),
        variants={
            "learned": {},
            "rows_and_columns": {"model.rows_and_columns": True},
            "sinusoids": {"model.positions": "sincos_2d"},
        },
        seeds=3,
        metric="eval/accuracy",
        published=(
            "5-shot accuracy of ViT-B/16 on ImageNet: 61.4 without positions, 64.2 with one per "
            "patch, 64.0 with one per row and column, 64.0 with relative ones"
        ),
        citation="Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv:2010.11929, table 8",
        expected=(("learned", "rows_and_columns"),),
    )
