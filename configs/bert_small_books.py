"""A small BERT with both of its losses, masked words and next sentences, on 19 English novels.

Command:   flax-transformers train configs/bert_small_books.py --workdir runs/bert_small_books
           with --data.source.path where the file lies elsewhere
Data:      19 books of Standard Ebooks (CC0), a JSON line per chapter: book, author, doc, paragraphs
Hardware:  2 CPU cores, 7 minutes (measured beside much other work)
Expected:  held-out masked-LM loss 6.05, unigram 6.46 (measured, one seed, 2 CPU cores); next
           sentences stay at chance: 49 % of 672 pairs right

A small BERT with learned positions looks at frequencies alone for a thousand steps;
modernbert_tiny.py has rotary ones. bert_base.py is the published shape.

The rows of the paper's masking ablation (arXiv:1810.04805, table 8) are two settings, such as
--objective.mask-share 1 --objective.random-share 0 for "always [MASK]", 0.8 and 0.2 for "80, 0, 20"
or 0 and 1 for "always a random word"; what is neither stays as it is.
"""

from flax_transformers.checkpointing.manager import CheckpointConfig
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
