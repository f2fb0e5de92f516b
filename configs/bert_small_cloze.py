"""A small BERT that learns to find answers by questions made out of books: before bert_small_xquad.

Command:   python benchmarks/cloze_questions.py data/standardebooks_en/books.jsonl.gz cloze.json
           flax-transformers train configs/bert_small_cloze.py --workdir runs/cloze \\
               --data.source.path cloze.json
Data:      15,535 sentences with a gap of 19 books of Standard Ebooks (CC0), in paragraphs of 20 to
           45 words
Hardware:  1 CPU core
Expected:  after 600 steps (a minute of one core's time) F1 14.4 % on 729 held-out questions, where
           window overlap gets 25.7 %; all of its steps were not run
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
            num_layers=2,
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
            init_std=0.05,
        ),
        objective=QuestionAnswering(doc_stride=32, max_question_length=32),
        data=TextData(
            source=QuestionSource("cloze.json"),
            tokenizer=TokenizerConfig("wordpiece", vocab_size=4096, lowercase=True),
            validation_fraction=0.05,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=2e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)),
        phases=(Phase(steps=1200, sequence_length=80, batch_size=16),),
        checkpoints=CheckpointConfig(every_steps=600),
        evaluation=Evaluation(every_steps=600, batch_size=64),
        logging=Logging(every_steps=50),
    )
