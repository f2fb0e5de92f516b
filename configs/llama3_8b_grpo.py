"""GRPO of a Llama 3 8B that follows instructions, on problems with numeric answers.

Command:   flax-transformers train llama3_8b_grpo --workdir gs://bucket/llama3_8b_grpo \\
               --init-from Meta-Llama-3-8B-Instruct/ \\
               --data.tokenizer.path Meta-Llama-3-8B-Instruct/
Hardware:  a TPU v5p slice of 64 chips, 4x4x4
Data:      prompts as the chat template renders them and their answers, as JSON lines with the keys
           "prompt" and "answer", in data/problems and data/held_out_problems
Expected:  not run
Planned:   not run. --topology v5p:4x4x4: a training step takes 13.3 of 95.7 GiB per chip and at
           least 4.53 s, an MFU of at most 74.7 %; sampling is not in these figures

Settings of DAPO (arXiv:2503.14476): the loss by tokens, the higher upper clip, no reference, 16
completions for each prompt, 16 updates for each rollout, and a warmup over 20 rollouts.
"""

import dataclasses

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.llama import SIZES
from flax_transformers.models.config import ComputeConfig
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.parallel.mesh import MeshConfig
from flax_transformers.post_training.reinforcement.policy import GroupRelativePolicy, Rollouts
from flax_transformers.post_training.reinforcement.rewards import NumericAnswer
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig

UPDATES_OF_A_ROLLOUT = 16


def problems(path: str) -> PairSource:
    """Prompts, which end with line breaks of the template, and answers in a folder."""
    return PairSource(path, source_field="prompt", target_field="answer", strip=False)


def get_config() -> TrainConfig:
    return TrainConfig(
        model=dataclasses.replace(
            SIZES["llama-3-8b"], eos_ids=(128001, 128009), attention_dropout=0.0
        ),
        objective=GroupRelativePolicy(
            rollouts=Rollouts(
                rewards=(NumericAnswer(),),
                completion_length=3072,
                group_size=16,
                batches=UPDATES_OF_A_ROLLOUT,
                mask_truncated=True,
                gather_weights=True,
            ),
            normalizer="dapo",
            clip_high=0.28,
        ),
        data=TextData(
            source=problems("data/problems"),
            validation_source=problems("data/held_out_problems"),
            tokenizer=TokenizerConfig(),
        ),
        optimizer=AdamW(
            learning_rate=1e-6,
            weight_decay=0.1,
            schedule=Schedule("constant", warmup_steps=20 * UPDATES_OF_A_ROLLOUT),
        ),
        phases=(Phase(steps=1_600, sequence_length=4096, batch_size=512, micro_batches=4),),
        mesh=MeshConfig(data=-1, fsdp=16),
        compute=ComputeConfig("auto", remat="full"),
        checkpoints=CheckpointConfig(every_steps=160),
        evaluation=Evaluation(every_steps=160, batch_size=512),
        logging=Logging(every_steps=1),
    )
