"""BERT base on SWAG: which of four endings continues a text (arXiv:1810.04805 §4.4).

Command:   flax-transformers train bert_base_swag --workdir gs://bucket/swag \\
               --init-from bert-base-uncased --data.tokenizer.path bert-base-uncased
           where bert-base-uncased is the folder with the published weights and vocab.txt
Hardware:  any; minutes on a TPU v5e slice of 8 chips (estimated)
Data:      SWAG (MIT), train.csv and val.csv of github.com/rowanz/swagaf
Expected:  not run. The paper reports an accuracy of 81.6 % on the development set

For RACE set --data.validation-source None --data.source.text-field article
--data.source.question-field question --data.source.choice-fields options
--data.source.label-field answer, and longer sequences; --data.validation-source.path, the file of
the development set, then has the same fields.
"""

from dataclasses import replace

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.labelled import ChoiceSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.bert import SIZES
from flax_transformers.multiple_choice.objective import MultipleChoice
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig

SWAG = ChoiceSource(
    "data/swag/train.csv",
    text_field="sent1",
    question_field="sent2",
    choice_fields=("ending0", "ending1", "ending2", "ending3"),
    label_field="label",
)


def get_config() -> TrainConfig:
    return TrainConfig(
        model=replace(SIZES["bert-base"], architecture="BertForMultipleChoice"),
        objective=MultipleChoice(),
        data=TextData(
            source=SWAG,
            validation_source=replace(SWAG, path="data/swag/val.csv"),
            tokenizer=TokenizerConfig("wordpiece", lowercase=True),
        ),
        optimizer=AdamW(
            learning_rate=2e-5,
            no_decay=("bias", "scale"),
            schedule=Schedule("linear", warmup_steps=1_380),
        ),
        # Three epochs of 73,546 questions.
        phases=(Phase(steps=13_800, sequence_length=128, batch_size=16),),
        checkpoints=CheckpointConfig(every_steps=1_000),
        evaluation=Evaluation(every_steps=4_600, batch_size=64),
        logging=Logging(every_steps=50),
    )
