"""The base model of "Attention Is All You Need" (arXiv:1706.03762), English to German.

Command:   flax-transformers prepare transformer_wmt14
           flax-transformers train transformer_wmt14 --workdir gs://bucket/wmt14
Hardware:  written for a TPU v5e slice of 8 chips: packed batches with about 25,000 source and
           25,000 target tokens
Data:      TFDS wmt14_translate/de-en; if it is not prepared, the error names the command that
           prepares it, which needs no TensorFlow
Expected:  not run. Table 2 of the paper reports 27.3 BLEU on newstest2014, with checkpoint
           averaging and the beam search of this recipe

For the big model: --model.hidden-size 1024 --model.num-heads 16 --model.intermediate-size 4096
--model.dropout 0.3, a learning rate of 4.94e-4 and 300,000 steps.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.marian import MarianConfig
from flax_transformers.models.generation_settings import GenerationSettings
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=MarianConfig(
            vocab_size=37000,
            pad_id=0,
            eos_ids=(1,),
            decoder_start_id=0,
            generation=GenerationSettings(
                num_beams=4,  # section 6.1, as the length penalty
                length_penalty=0.6,
                length_penalty_form="gnmt",
                pad_token_id=0,
                eos_token_id=1,
                decoder_start_token_id=0,
            ),
        ),
        objective=SequenceToSequence(long_pairs="skip"),
        data=TextData(
            source=PairSource("tfds:wmt14_translate/de-en", source_field="en", target_field="de"),
            validation_source=PairSource(
                "tfds:wmt14_translate/de-en",
                split="validation",
                source_field="en",
                target_field="de",
            ),
            tokenizer=TokenizerConfig("bpe", vocab_size=37000),
            shards=64,
            workers=4,
        ),
        optimizer=AdamW(
            learning_rate=6.99e-4,  # (512 * 4,000) ** -0.5
            b2=0.98,
            eps=1e-9,
            weight_decay=0.0,
            max_grad_norm=None,
            schedule=Schedule("inverse_sqrt", warmup_steps=4_000),
        ),
        phases=(Phase(steps=100_000, sequence_length=256, batch_size=96),),
        checkpoints=CheckpointConfig(every_steps=1_000, keep_every=10_000),
        evaluation=Evaluation(every_steps=5_000, batch_size=96),
        logging=Logging(every_steps=100),
    )
