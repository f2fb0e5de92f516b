"""BERT base on SQuAD 1.1: extractive question answering (arXiv:1810.04805 §4.2).

Command:   flax-transformers train bert_base_squad --workdir gs://bucket/squad \\
               --init-from bert-base-uncased --data.tokenizer.path bert-base-uncased
           where bert-base-uncased is the folder with the published weights and vocab.txt
Hardware:  any; minutes on a TPU v5e slice of 8 chips (estimated)
Data:      SQuAD 1.1 (CC BY-SA 4.0), train-v1.1.json and dev-v1.1.json. For SQuAD 2.0 add
           --objective.no-answer True
Expected:  not run. The paper reports 80.8 exact match and 88.5 F1 on the development set
"""

from dataclasses import replace

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.bert import SIZES
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=replace(SIZES["bert-base"], architecture="BertForQuestionAnswering"),
        objective=QuestionAnswering(),
        data=TextData(
            source=QuestionSource("data/squad/train-v1.1.json", on_invalid="skip"),
            validation_source=QuestionSource("data/squad/dev-v1.1.json"),
            tokenizer=TokenizerConfig("wordpiece", lowercase=True),
        ),
        optimizer=AdamW(
            learning_rate=5e-5,
            no_decay=("bias", "scale"),
            schedule=Schedule("linear", warmup_steps=830),
        ),
        # Three epochs of some 88,500 windows.
        phases=(Phase(steps=8_300, sequence_length=384, batch_size=32),),
        checkpoints=CheckpointConfig(every_steps=1_000),
        evaluation=Evaluation(every_steps=2_000, batch_size=128),
        logging=Logging(every_steps=50),
    )
