"""Instruction tuning of Llama 3 8B: conversations packed into sequences of 4,096 tokens.

Command:   flax-transformers prepare llama3_8b_sft \\
               --data.tokenizer.path Meta-Llama-3-8B-Instruct/
           flax-transformers train llama3_8b_sft --workdir gs://bucket/llama3_8b_sft \\
               --init-from Meta-Llama-3-8B/ --data.tokenizer.path Meta-Llama-3-8B-Instruct/
Hardware:  a TPU v5p slice of 16 chips, 2x2x4
Data:      conversations as JSON lines with the key "messages" in data/conversations; the tokenizer
           of the instruction-tuned model has the chat template
Expected:  not run
Planned:   not run. --topology v5p:2x2x4: 21.1 of 95.7 GiB per chip, a step time of at least 4.44 s,
           an MFU of at most 77.6 %

Learning rate, schedule and number of sequences in a batch are those of Tulu 3 for 8B
(arXiv:2411.15124), which does not pack. Set the steps to two epochs of the data.
"""

import dataclasses

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.llama import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.post_training.chat_data import ChatData
from flax_transformers.post_training.conversations import ConversationSource
from flax_transformers.post_training.supervised import SupervisedFineTuning
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def conversations(path: str) -> ChatData:
    """Those in a folder, in the tokenizer of the instruction-tuned model."""
    return ChatData(
        source=ConversationSource(path),
        tokenizer=TokenizerConfig(),
        validation_fraction=0.005,
        shards=64,
        workers=4,
    )


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(
            SIZES["llama-3-8b"], eos_ids=(128001, 128009), attention_dropout=0.0
        ),
        objective=SupervisedFineTuning(),
        data=conversations("data/conversations"),
        optimizer=AdamW(
            learning_rate=5e-6, weight_decay=0.0, schedule=Schedule("linear", warmup_steps=150)
        ),
        phases=(Phase(steps=5_000, sequence_length=4096, batch_size=128),),
        mesh=MeshConfig(data=-1, fsdp=16),
        compute=ComputeConfig("auto", remat="full"),
        checkpoints=CheckpointConfig(every_steps=500),
        evaluation=Evaluation(every_steps=500, batch_size=128),
        logging=Logging(every_steps=10),
    )
