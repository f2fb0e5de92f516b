"""A small BERT that learns to find answers by questions made out of books, in short texts.

Command:   python benchmarks/cloze_questions.py short.json data/standardebooks_en/books.jsonl.gz \\
               --words 8 22 --share 0.7
           flax-transformers train configs/bert_small_cloze.py --workdir runs/cloze \\
               --data.source.path short.json
Data:      42,170 sentences with a gap of 19 books of Standard Ebooks (CC0), in texts of 8 to 22
           words; about every fourth chapter is held out
Hardware:  1 CPU core, 2 min 17 s
Expected:  F1 48, 82 and 76 % of held-out questions, window overlap 24 % (measured, seeds
           0 to 2)

The first of three: bert_small_cloze_long.py and bert_small_xquad.py go on from it. In texts this
short a model finds out within 500 steps that words of the question matter where they stand in the
text; in texts of about 40 words it had not after 1,300.
"""

from flax_transformers.data.config import TextData
from flax_transformers.data.squad import QuestionSource
from flax_transformers.data.tokenizers import TokenizerConfig
from flax_transformers.families.bert import BertConfig
from flax_transformers.models.positions import Rope
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.training.checkpoints import CheckpointConfig
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig
from flax_transformers.training.optimizers import AdamW
from flax_transformers.training.schedules import Schedule


def get_config() -> TrainConfig:
    return TrainConfig(
        model=BertConfig(
            architecture="BertForQuestionAnswering",
            vocab_size=4096,
            hidden_size=128,
            num_layers=3,
            num_heads=4,
            intermediate_size=256,
            max_positions=128,
            positions="none",
            rope=Rope(),
            norm_place="pre",
            norm_eps=1e-6,
            embedding_norm=False,
            dropout=0.0,
            attention_dropout=0.0,
            init_std=0.08,
        ),
        objective=QuestionAnswering(doc_stride=32, max_question_length=20),
        data=TextData(
            source=QuestionSource("short.json"),
            tokenizer=TokenizerConfig("wordpiece", vocab_size=4096, lowercase=True),
            validation_fraction=0.25,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=2e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)),
        phases=(Phase(steps=800, sequence_length=52, batch_size=64),),
        checkpoints=CheckpointConfig(every_steps=600),
        evaluation=Evaluation(every_steps=400, max_examples=1000, batch_size=64),
        logging=Logging(every_steps=50),
    )
