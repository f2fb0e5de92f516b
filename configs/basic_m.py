"""BASIC-M: CoAtNet-3 and a text encoder of 12 layers, trained on pairs (arXiv:2111.10050).

Command:   flax-transformers train basic_m --workdir gs://bucket/basic_m \\
               --data.source.path SHARDS --data.tokenizer.path TOKENIZER
           where SHARDS is a folder of WebDataset tar files with images and .txt captions, and
           TOKENIZER the folder of a SentencePiece tokenizer of 32,000 tokens, such as T5's
Hardware:  written for a TPU v5e slice of 256 chips, 16x16
Data:      6.6 billion pairs (not published)
Expected:  not run. The paper reports the accuracies of models whose image encoder was first trained
           on labels, so there is none to compare with
Planned:   not run. --topology v5e:16x16: 12.4 of 15.75 GiB per chip, a step time of at least
           1.46 s, an MFU of at most 24.6 %: it is bound by memory bandwidth

Differences from the original: both encoders are trained on pairs from the start, by AdamW with the
first moment in bfloat16 instead of Adafactor with weight decay.
Cannot be exported: transformers has no class for it.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.image_text import ImageTextData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.basic import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.training.config import Evaluation, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=SIZES["basic-m"],
        objective=ImageTextContrastive(mean=(0.5,), std=(0.5,)),
        data=ImageTextData(
            source=ImageSource("data/pairs", caption_field="txt"),
            crop_fraction=1.0,
            augmentation=Augmentation(crop="resized", scale=(0.8, 1.0)),
            tokenizer=TokenizerConfig(path="data/t5_tokenizer"),
            workers=16,
        ),
        optimizer=AdamW(
            learning_rate=1e-3,
            weight_decay=2.5e-3,
            first_moment_dtype="bfloat16",
            schedule=Schedule("cosine", warmup_steps=10_000),
        ),
        phases=(Phase(steps=500_000, sequence_length=64, batch_size=65_536, micro_batches=8),),
        mesh=MeshConfig(data=-1),
        compute=ComputeConfig(dtype="auto", remat="dots"),
        checkpoints=CheckpointConfig(every_steps=1000),
        evaluation=Evaluation(every_steps=5000, batch_size=2048, max_examples=20_480),
        seed=0,
    )
