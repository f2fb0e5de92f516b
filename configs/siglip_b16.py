"""SigLIP with ViT-B/16 at its published size and batch.

Command:   flax-transformers train siglip_b16 --workdir runs/siglip_b16 \\
               --data.source.path SHARDS --data.tokenizer.path TOKENIZER
           where SHARDS is a folder of WebDataset tar files with images and .txt captions, and
           TOKENIZER the folder of the published tokenizer
Hardware:  a TPU v5e slice of 256 chips, 16x16
Data:      pairs of WebLI, of which 40 billion are seen (not published)
Expected:  not measured here
Planned:   not run. --topology v5e:16x16: 11.7 of 15.75 GiB per chip, a step time of at least
           0.109 s, an MFU of at most 82.9 %

Weight decay here is multiplied by the learning rate and in the original it is not: 0.1 here equals
1e-4 there at the peak learning rate.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.image_text import ImageTextData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.siglip import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import Evaluation, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=SIZES["siglip-b16"],
        objective=ImageTextContrastive(loss="sigmoid", mean=(0.5,), std=(0.5,)),
        data=ImageTextData(
            source=ImageSource("data/pairs", caption_field="txt"),
            crop_fraction=1.0,
            augmentation=Augmentation(crop="resized", scale=(0.9, 1.0)),
            tokenizer=TokenizerConfig(path="data/siglip_tokenizer"),
            workers=16,
        ),
        optimizer=AdamW(
            learning_rate=1e-3,
            b2=0.95,
            weight_decay=0.1,
            schedule=Schedule("cosine", warmup_steps=20_000),
        ),
        phases=(Phase(steps=1_220_000, sequence_length=64, batch_size=32_768),),
        mesh=MeshConfig(data=-1),
        compute=ComputeConfig(dtype="auto", remat="dots"),
        checkpoints=CheckpointConfig(every_steps=1000),
        evaluation=Evaluation(every_steps=5000, batch_size=2048, max_examples=20_480),
        seed=0,
    )
