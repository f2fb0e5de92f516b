"""GPT-2 small as nanoGPT trains it, with the learning rate of GPT-3 (arXiv:2005.14165, table 2.1).

Command:   flax-transformers prepare gpt2_small
           flax-transformers train gpt2_small --workdir gs://bucket/gpt2
Hardware:  a TPU v5e slice of 16 chips, 4x4: batches of 480 sequences of 1,024 tokens take 10.5 of
           15.75 GiB and at least 0.14 s on each chip (planned, not run)
Data:      the pages of OpenWebText in data/openwebtext, one JSON line per page with the key "text"
Expected:  not run. nanoGPT's README reports a loss of 2.85 after 600,000 steps with GPT-2's own
           tokenizer

The vocabulary is a byte-level BPE of GPT-2's size, trained on the corpus. To use GPT-2's own
tokenizer, set --data.tokenizer.path to the folder of its files. Layers have biases, as in GPT-2;
nanoGPT leaves them out.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=GPT2Config(dropout=0.0, attention_dropout=0.0),
        objective=CausalLM(attend_across=True),
        data=TextData(
            source=TextSource("data/openwebtext"),
            tokenizer=TokenizerConfig("byte_level_bpe", vocab_size=50257),
            validation_fraction=0.0005,
            shards=256,
            workers=4,
        ),
        optimizer=AdamW(
            learning_rate=6e-4,
            b2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            no_decay=("bias", "scale"),
            schedule=Schedule("cosine", warmup_steps=2_000, end_fraction=0.1),
        ),
        phases=(Phase(steps=600_000, sequence_length=1024, batch_size=480),),
        compute=ComputeConfig(dtype="auto", remat="dots"),
        checkpoints=CheckpointConfig(every_steps=2_000, keep_every=100_000),
        evaluation=Evaluation(every_steps=10_000, batch_size=256, max_examples=25_600),
        logging=Logging(every_steps=100),
    )
