"""A reward model of the answers to instructions: right ones against wrong ones.

Command:   flax-transformers train assistant_small_reward --workdir runs/assistant_reward
Data:      of benchmarks/instructions.py: right and wrong answers to the training instructions; the
           held-out ones are from the test sets
Hardware:  2 CPU cores, 3 minutes
Expected:  81.7 to 82.6 % of held-out pairs in the right order, chance 50 % (measured, 3 seeds)
"""

import dataclasses

from assistant_small import FOLDER, TOKENIZER
from assistant_small import get_config as demonstrations

from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.post_training.chat_data import ChatData
from flax_transformers.post_training.conversations import ConversationSource
from flax_transformers.post_training.reward_model import RewardModel
from flax_transformers.training.config import Evaluation, Phase, TrainConfig


def preferences() -> ChatData:
    return ChatData(
        source=ConversationSource(f"{FOLDER}/preferences.jsonl"),
        validation_source=ConversationSource(f"{FOLDER}/held_out_preferences.jsonl"),
        tokenizer=TOKENIZER,
        shards=1,
    )


def get_config() -> TrainConfig:
    base = demonstrations()
    model = dataclasses.replace(
        base.model, architecture="LlamaForSequenceClassification", num_labels=1
    )
    return dataclasses.replace(
        base,
        model=model,
        init_from="runs/assistant",
        objective=RewardModel(completions=8, centering=0.01),
        data=preferences(),
        optimizer=AdamW(
            learning_rate=5e-4, weight_decay=0.0, schedule=Schedule("linear", warmup_steps=50)
        ),
        phases=(Phase(steps=200, sequence_length=256, batch_size=16),),
        evaluation=Evaluation(every_steps=50),
    )
