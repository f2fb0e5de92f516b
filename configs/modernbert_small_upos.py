"""Part-of-speech tagging of English, by a small ModernBERT from random weights.

Command:   flax-transformers train modernbert_small_upos --workdir runs/upos
Data:      Universal Dependencies English EWT (CC BY-SA 4.0): 12,544 training sentences,
           en_ewt-ud-train.conllu.gz, scored on the 2,077 of en_ewt-ud-test.conllu.gz. Set
           --data.source.path and --data.validation-source.path if the files are elsewhere
Hardware:  2 CPU cores, 2 to 3 minutes (measured while other jobs ran)
Expected:  accuracy 91.8 % per word (measured, one seed, 2 CPU cores); the baseline, the most
           frequent tag of each word, reaches 86.2 %. Published: UDPipe 1 94.4 %, UDify (from
           multilingual BERT) 96.3 %
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.modernbert import ModernBertConfig
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ModernBertConfig(
            architecture="ModernBertForTokenClassification",
            vocab_size=8192,
            hidden_size=96,
            num_layers=2,
            num_heads=4,
            intermediate_size=192,
            max_positions=128,
            dropout=0.1,
            init_std=0.05,
            pad_id=0,
            num_labels=17,
        ),
        objective=TokenClassification(),
        data=TextData(
            source=TaggedSource("data/ud_english_ewt/en_ewt-ud-train.conllu.gz"),
            validation_source=TaggedSource("data/ud_english_ewt/en_ewt-ud-test.conllu.gz"),
            tokenizer=TokenizerConfig("wordpiece", vocab_size=8192, lowercase=False),
            shards=1,
        ),
        optimizer=AdamW(learning_rate=2e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)),
        phases=(Phase(steps=1400, sequence_length=40, batch_size=16),),
        checkpoints=CheckpointConfig(every_steps=700),
        evaluation=Evaluation(every_steps=700, batch_size=64),
        logging=Logging(every_steps=50),
    )
