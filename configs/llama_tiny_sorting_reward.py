"""A reward model of sorted digits: right answers against wrong ones.

Command:   flax-transformers train llama_tiny_sorting_reward --init-from runs/sorting \\
               --workdir runs/sorting_reward
Data:      20,000 pairs that are generated; 5 % of them are held out. A wrong answer has one digit
           changed, or its digits in another order
Hardware:  2 CPU cores, 2 to 5 minutes (measured while other jobs ran)
Expected:  97.4, 99.8 and 98.7 % of held-out pairs in the right order, chance 50 % (measured,
           3 seeds)
"""

import dataclasses

from llama_tiny_sorting import get_config as demonstrations

from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.post_training.chat_data import ChatData
from flax_transformers.post_training.conversations import ConversationSource
from flax_transformers.post_training.problems import Problems
from flax_transformers.post_training.reward_model import RewardModel
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def preferences() -> ChatData:
    """Right answers against wrong ones, of the training problems of `llama_tiny_sorting_grpo`."""
    return ChatData(
        source=ConversationSource("embedded", problems=Problems(task="sorting", digits=8)),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.05,
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
        objective=RewardModel(completions=4, centering=0.01),
        data=preferences(),
        optimizer=AdamW(
            learning_rate=2e-3, weight_decay=0.0, schedule=Schedule("linear", warmup_steps=50)
        ),
        phases=(Phase(steps=200, sequence_length=96, batch_size=64),),
        evaluation=Evaluation(every_steps=20, batch_size=64),
        logging=Logging(every_steps=10),
    )
