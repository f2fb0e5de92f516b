"""BERT large on English Wikipedia: the recipe of bert_base.py with 24 layers of width 1,024.

Command:   flax-transformers prepare bert_large
           flax-transformers train bert_large --workdir gs://bucket/bert_large
Hardware:  written for a TPU v5e slice of 64 chips; --mesh.fsdp shards parameters and optimizer
           state if they do not fit on one chip
Data:      as bert_base.py, and the same token store
Expected:  not run. Table 6 of arXiv:1810.04805 reports a masked-LM perplexity of 3.23, which is a
           held-out loss of 1.17; see bert_base.py for why this is an estimate
Planned:   not run. --topology v5e:8x8: 7.7 of 15.75 GiB per chip in the second phase, a step time
           of at least 0.041 s, an MFU of at most 50.7 %: with four sequences per chip, memory
           bandwidth is the bottleneck
"""

import dataclasses

import bert_base  # recipes may import others of their folder

from flax_transformers.families.bert import SIZES
from flax_transformers.training.config import TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(bert_base.get_config(), model=SIZES["bert-large"])
