"""BERT large on English Wikipedia: the recipe of bert_base.py at 24 layers of width 1,024.

Command:   flax-transformers prepare configs/bert_large.py
           flax-transformers train configs/bert_large.py --workdir gs://bucket/bert_large
Hardware:  written for a TPU v5e slice of 64 chips; parameters and optimizer state are divided by
           --mesh.fsdp where they do not fit whole
Data:      as bert_base.py, and the same token store
Expected:  not run here. Table 6 of arXiv:1810.04805 gives the original a masked-LM perplexity of
           3.23, a held-out loss of 1.17 (estimated, with the caveats of bert_base.py)
Planned:   not run; --topology v5e:8x8: 11.5 of 15.75 GiB on each chip in the second phase, a step
           takes 0.082 s at least, MFU is 25.2 % at most: four rows on a chip are bound by memory
"""

import dataclasses

import bert_base  # a recipe may build on another in its folder

from flax_transformers.families.bert import SIZES
from flax_transformers.training.config import TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(bert_base.get_config(), model=SIZES["bert-large"])
