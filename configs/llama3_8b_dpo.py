"""Direct preference optimization of Llama 3 8B after instruction tuning.

Command:   flax-transformers train llama3_8b_dpo --workdir gs://bucket/llama3_8b_dpo \\
               --init-from gs://bucket/llama3_8b_sft \\
               --data.tokenizer.path Meta-Llama-3-8B-Instruct/
Hardware:  a TPU v5p slice of 16 chips, 2x2x4
Data:      preferences as JSON lines with the keys "chosen" and "rejected", lists of messages, in
           data/preferences
Expected:  not run
Planned:   not run. --topology v5p:2x2x4: 14.4 of 95.7 GiB per chip, a step time of at least 2.22 s,
           an MFU of at most 77.6 %

Learning rate, schedule and beta are those of Zephyr (arXiv:2310.16944). A sequence of 4,096 tokens
holds one pair or several. The reference's log-probabilities are computed before the first step, so
that no second model is in memory. Set the steps to one epoch of the data, a tenth of them for warm-
up.
"""

import dataclasses

from llama3_8b_sft import conversations
from llama3_8b_sft import get_config as supervised

from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.post_training.preference import DirectPreference
from flax_transformers.training.config import Evaluation, Phase, TrainConfig


def get_config() -> TrainConfig:
    return dataclasses.replace(
        supervised(),
        objective=DirectPreference(beta=0.1, completions=8),
        data=conversations("data/preferences"),
        optimizer=AdamW(
            learning_rate=5e-7, weight_decay=0.0, schedule=Schedule("linear", warmup_steps=100)
        ),
        phases=(Phase(steps=1_000, sequence_length=4096, batch_size=64),),
        evaluation=Evaluation(every_steps=100, batch_size=64),
    )
