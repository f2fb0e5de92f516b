"""A tiny Llama that learns to sort digits from 100 demonstrations: the first stage of GRPO.

Command:   flax-transformers train llama_tiny_sorting --workdir runs/sorting
Hardware:  2 CPU cores, half a minute (measured while other jobs ran)
Expected:  27 to 37 % of held-out strings sorted exactly (measured, 3 seeds), by
           flax-transformers evaluate runs/sorting --config llama_tiny_sorting_grpo
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.families.llama import LlamaConfig
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.post_training.problems import Problems
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=LlamaConfig(
            vocab_size=262,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            intermediate_size=128,
            max_positions=96,
            init_std=0.05,
            tie_embeddings=True,
            bos_id=None,
            eos_ids=(1,),
            pad_id=0,
        ),
        objective=CausalLM(),
        data=Problems(task="sorting", digits=8, training=100, form="texts"),
        optimizer=AdamW(learning_rate=3e-3, schedule=Schedule("linear", warmup_steps=20)),
        phases=(Phase(steps=300, sequence_length=32, batch_size=64),),
        checkpoints=CheckpointConfig(every_steps=0),
        evaluation=Evaluation(every_steps=0),
        logging=Logging(every_steps=50),
        seed=0,
    )
