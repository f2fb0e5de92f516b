"""CLIP with ViT-B/32 at its published size, batch and schedule.

Command:   flax-transformers train clip_b32 --workdir runs/clip_b32 \\
               --data.source.path SHARDS --data.tokenizer.path TOKENIZER
           where SHARDS is a folder of WebDataset tar files with images and .txt captions, and
           TOKENIZER the folder of CLIP's published tokenizer
Hardware:  a TPU v5e slice of 256 chips, 16x16
Data:      400 million pairs (not published; LAION-400M has as many)
Expected:  zero-shot accuracy on ImageNet 63.2 % (published, arXiv:2103.00020 table 11); not
           measured here
Planned:   not run. --topology v5e:16x16: 4.5 of 15.75 GiB per chip, a step time of at least
           0.029 s, an MFU of at most 99.0 %

All weights are decayed but for biases, gains and the scale of the loss (section 2.5).
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.image_text import ImageTextData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.clip import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import Evaluation, Phase, TrainConfig

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the published image processor
STD = (0.26862954, 0.26130258, 0.27577711)


def get_config() -> TrainConfig:
    return TrainConfig(
        model=SIZES["clip-b32"],
        objective=ImageTextContrastive(mean=MEAN, std=STD),
        data=ImageTextData(
            source=ImageSource("data/pairs", caption_field="txt"),
            crop_fraction=1.0,
            augmentation=Augmentation(crop="shift", padding=0),
            tokenizer=TokenizerConfig(path="data/clip_tokenizer"),
            workers=16,
        ),
        optimizer=AdamW(
            learning_rate=5e-4,
            b2=0.98,
            eps=1e-6,
            weight_decay=0.2,
            no_decay=("bias", "scale"),
            schedule=Schedule("cosine", warmup_steps=2000),
        ),
        phases=(Phase(steps=390_625, sequence_length=77, batch_size=32_768),),
        mesh=MeshConfig(data=-1),
        compute=ComputeConfig(dtype="auto", remat="dots"),
        checkpoints=CheckpointConfig(every_steps=1000),
        evaluation=Evaluation(every_steps=5000, batch_size=2048, max_examples=20_480),
        seed=0,
    )
