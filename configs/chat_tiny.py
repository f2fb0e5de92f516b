"""Instruction tuning of a tiny Llama on generated problems, such as "sort 52190=" with "01259".

Command:   flax-transformers train chat_tiny --workdir runs/chat_tiny
           flax-transformers chat runs/chat_tiny
Data:      4,000 conversations that are generated; 5 % of them are held out
Hardware:  2 CPU cores, 18 minutes (measured while other jobs ran)
Expected:  held-out loss 0.218 nats per learned byte, unigram baseline 3.296; accuracy 92.0 % of
           the bytes of answers and of what ends them (measured, one seed)
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.llama import LlamaConfig
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.post_training.chat_data import ChatData
from flax_transformers.post_training.conversations import ConversationSource
from flax_transformers.post_training.supervised import SupervisedFineTuning
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=LlamaConfig(
            vocab_size=262,
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            num_key_value_heads=4,
            intermediate_size=352,
            max_positions=256,
            pad_id=0,
            bos_id=None,
            eos_ids=(1,),
        ),
        objective=SupervisedFineTuning(),
        data=ChatData(
            source=ConversationSource("embedded"),
            tokenizer=TokenizerConfig("bytes"),
            validation_fraction=0.05,
            shards=1,
        ),
        optimizer=AdamW(
            learning_rate=2e-3,
            weight_decay=0.05,
            schedule=Schedule("cosine", warmup_steps=50, end_fraction=0.1),
        ),
        phases=(Phase(steps=1200, sequence_length=256, batch_size=16),),
        checkpoints=CheckpointConfig(every_steps=600),
        evaluation=Evaluation(every_steps=300),
        logging=Logging(every_steps=20),
    )
