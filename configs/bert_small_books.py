"""A small BERT with masked-LM and next-sentence losses, on 19 English novels.

Command:   flax-transformers train bert_small_books --workdir runs/bert_small_books
Data:      19 books of Standard Ebooks (CC0), one JSON line per chapter with the keys book, author,
           doc and paragraphs; set --data.source.path if the file is elsewhere
Hardware:  2 CPU cores, 4 minutes (measured while other jobs ran)
Expected:  held-out masked-LM loss 6.05, unigram baseline 6.46; next-sentence accuracy stays at
           chance, 49 % of 672 pairs (measured, one seed, 2 CPU cores)

In about its first thousand steps a small BERT with learned positions learns token frequencies only.
modernbert_tiny.py has rotary positions and learns faster. bert_base.py has the published shape.

The paper's masking ablation (arXiv:1810.04805, table 8) sets two fields: --objective.mask-share 1
--objective.random-share 0 always puts [MASK], 0.8 and 0.2 never keeps the original token, and 0 and
1 always puts a random token. The rest of the chosen tokens stay unchanged.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.bert import BertConfig
from flax_transformers.objectives.next_sentence import NextSentence
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=BertConfig(
            architecture="BertForPreTraining",
            vocab_size=4096,
            hidden_size=128,
            num_layers=2,
            num_heads=4,
            intermediate_size=512,
            max_positions=128,
            dropout=0.0,
            attention_dropout=0.0,
            init_std=0.05,
        ),
        objective=NextSentence(),
        data=TextData(
            source=TextSource("data/standardebooks_en/books.jsonl.gz", text_field="paragraphs"),
            tokenizer=TokenizerConfig("wordpiece", vocab_size=4096, lowercase=True),
            validation_fraction=0.02,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=2e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)),
        phases=(Phase(steps=600, sequence_length=128, batch_size=16),),
        checkpoints=CheckpointConfig(every_steps=300),
        evaluation=Evaluation(every_steps=300, max_examples=1024),
        logging=Logging(every_steps=20),
    )
