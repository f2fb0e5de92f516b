"""A small Transformer (arXiv:1706.03762) that translates six Turkic languages into English.

Command:   for l in tur aze tat kaz uzb tuk; do
               paste tatoeba.$l-eng.$l tatoeba.$l-eng.eng
           done > turkic.tsv
           flax-transformers train transformer_tatoeba --workdir runs/tatoeba \\
               --data.source.path turkic.tsv
           BLEU and chrF need the ``evaluation`` extra
Data:      4,206 sentence pairs of Tatoeba (CC BY 2.0 FR), from data/tatoeba/v1 of
           github.com/facebookresearch/LASER; a tenth of the English sentences is held out. Set
           --data.source.path if turkic.tsv is elsewhere
Hardware:  2 CPU cores, 12 minutes (measured while other jobs ran)
Expected:  loss 3.58 (unigram baseline 5.44), BLEU 2.6 and chrF 13.5 on 428 held-out pairs
           (measured, one seed, 2 CPU cores). Baselines: copying the source has BLEU 0.4 and chrF
           7.0, word lookup 1.4 and 14.2, so the model's chrF is below that of word lookup.
           A pre-norm model, which Marian in transformers cannot be, had BLEU 5.7 and chrF 18.2 on
           the same rows with --model.norm-position pre --model.init-std 0.05
           --optimizer.learning-rate 2e-3 (measured with an earlier version, three seeds)
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.marian import MarianConfig
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=MarianConfig(
            vocab_size=3000,
            hidden_size=128,
            num_layers=2,
            num_heads=4,
            intermediate_size=512,
            max_positions=128,
            dropout=0.2,
            pad_id=0,
            eos_ids=(1,),
            decoder_start_id=0,
        ),
        objective=SequenceToSequence(),
        data=TextData(
            source=PairSource("data/tatoeba/turkic.tsv"),
            tokenizer=TokenizerConfig("unigram", vocab_size=3000),
            validation_fraction=0.1,
            shards=1,
        ),
        optimizer=AdamW(learning_rate=1e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)),
        phases=(Phase(steps=900, sequence_length=64, batch_size=24),),
        checkpoints=CheckpointConfig(every_steps=450),
        evaluation=Evaluation(every_steps=300),
        logging=Logging(every_steps=20),
    )
