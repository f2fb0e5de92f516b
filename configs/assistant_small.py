"""Instruction tuning of a small Llama on instructions made from real data.

Command:   python benchmarks/instructions.py data/instructions --data data
           flax-transformers train assistant_small_base --workdir runs/assistant_base
           flax-transformers train assistant_small --workdir runs/assistant
           flax-transformers evaluate runs/assistant --config assistant_small_grpo
Data:      18,900 demonstrations of five tasks: intents (CLINC150), parts of speech (UD English
           EWT), translations from six languages (Tatoeba), sums, digits in order
Hardware:  2 CPU cores, 7 minutes
Expected:  38.7 to 44.9 % of held-out intents, 9.4 to 10.2 % of tagged sentences, no translation,
           0.4 to 2.0 % of sums and 84.8 to 89.5 % of digits answered exactly (measured, 3 seeds;
           docs/results/instructions.md)
"""

import dataclasses

from assistant_small_base import get_config as pretraining

from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.post_training.chat_data import ChatData
from flax_transformers.post_training.conversations import ConversationSource
from flax_transformers.post_training.supervised import SupervisedFineTuning
from flax_transformers.training.config import Evaluation, Phase, TrainConfig

FOLDER = "data/instructions"
PRETRAINED = "runs/assistant_base"
TOKENIZER = TokenizerConfig(path=f"{PRETRAINED}/tokenizer")


def get_config() -> TrainConfig:
    return dataclasses.replace(
        pretraining(),
        init_from=PRETRAINED,
        objective=SupervisedFineTuning(),
        data=ChatData(
            source=ConversationSource(f"{FOLDER}/demonstrations.jsonl"),
            tokenizer=TOKENIZER,
            validation_fraction=0.02,
            shards=1,
        ),
        optimizer=AdamW(
            learning_rate=1e-3,
            b2=0.98,
            weight_decay=0.1,
            schedule=Schedule("linear", warmup_steps=50),
        ),
        phases=(Phase(steps=500, sequence_length=128, batch_size=32),),
        evaluation=Evaluation(every_steps=250),
    )
