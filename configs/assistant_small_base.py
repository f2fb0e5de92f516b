"""A small Llama pretrained on 19 English novels: the first stage of assistant_small.py.

Command:   flax-transformers train assistant_small_base --workdir runs/assistant_base
Data:      19 books of Standard Ebooks (CC0), one JSON line per chapter with the keys book, author,
           doc and paragraphs; set --data.source.path if the file is elsewhere
Hardware:  2 CPU cores, 7 minutes
Expected:  held-out loss 4.31 nats, unigram 6.63 (measured, one seed)
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.llama import LlamaConfig
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=LlamaConfig(
            vocab_size=4096,
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            intermediate_size=352,
            max_positions=256,
            tie_embeddings=True,
            bos_id=4095,
            eos_ids=(4095,),
            init_std=0.05,
        ),
        objective=CausalLM(),
        data=TextData(
            source=TextSource("data/standardebooks_en/books.jsonl.gz", text_field="paragraphs"),
            tokenizer=TokenizerConfig("byte_level_bpe", vocab_size=4096, training_documents=400),
            validation_fraction=0.02,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=2e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)),
        phases=(Phase(steps=800, sequence_length=128, batch_size=32),),
        checkpoints=CheckpointConfig(every_steps=400),
        evaluation=Evaluation(every_steps=200, max_examples=512),
        logging=Logging(every_steps=20),
    )
