"""Variations of the 2017 Transformer (Vaswani et al., arXiv:1706.03762, table 3).

Command:   for l in $LANGUAGES; do
               paste tatoeba.$l-eng.$l tatoeba.$l-eng.eng
           done > pairs.tsv
           flax-transformers sweep studies/transformer_variations.py \\
               --workdir runs/transformer_variations --data.source.path pairs.tsv
           with LANGUAGES="fra spa ita por ron cat glg oci deu nld swe dan nob afr"
Data:      14,000 sentence pairs of Tatoeba (CC BY 2.0 FR), from data/tatoeba/v1 of
           github.com/facebookresearch/LASER: eight Romance and six Germanic languages into English.
           A tenth of the English sentences is held out
Hardware:  2 CPU cores, two hours by two processes at idle priority beside other jobs (2.1 hours of
           CPU time)
Result:    docs/results/transformer_variations.md: nine of ten published differences appear
Size:      18 variants x 3 seeds, 2 + 2 layers, 128 wide, 8 heads: 600 steps

The base has a quarter of the paper's width, heads and feed-forward width in the same proportion,
and a third of its layers. The metric is the held-out cross-entropy per token, the logarithm of the
paper's perplexity; label smoothing is part of training alone.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.config import TextData
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.marian import MarianConfig
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.sweeps.study import Study
from flax_transformers.training.config import Evaluation, Logging, Phase, TrainConfig

STEPS = 600
WIDTH, HEADS, FEED_FORWARD = 128, 8, 512


def heads(number: int) -> dict[str, object]:
    """Rows A: the sum of the heads' widths stays the same."""
    return {"model.num_heads": number}


def key_width(width: int) -> dict[str, object]:
    """Rows B: the values keep their width."""
    return {"model.head_dim": width, "model.value_head_dim": WIDTH // HEADS}


def model_width(width: int) -> dict[str, object]:
    """Rows C: the heads are as much wider or narrower."""
    return {"model.hidden_size": width}


VARIANTS: dict[str, dict[str, object]] = {
    "base": {},
    "heads_1": heads(1),
    "heads_4": heads(4),
    "heads_16": heads(16),
    "heads_32": heads(32),
    "key_width_4": key_width(4),
    "key_width_8": key_width(8),
    "layers_1": {"model.num_layers": 1},
    "layers_4": {"model.num_layers": 4},
    "width_64": model_width(64),
    "width_256": model_width(256),
    "feed_forward_256": {"model.intermediate_size": 256},
    "feed_forward_1024": {"model.intermediate_size": 1024},
    "dropout_0": {"model.dropout": 0.0},
    "dropout_0.2": {"model.dropout": 0.2},
    "smoothing_0": {"objective.label_smoothing": 0.0},
    "smoothing_0.2": {"objective.label_smoothing": 0.2},
    "learned_positions": {"model.sinusoidal": False},
}


def get_study() -> Study:
    return Study(
        base=TrainConfig(
            model=MarianConfig(
                vocab_size=4096,
                hidden_size=WIDTH,
                num_layers=2,
                num_heads=HEADS,
                intermediate_size=FEED_FORWARD,
                max_positions=64,
                dropout=0.1,
                pad_id=0,
                eos_ids=(1,),
                decoder_start_id=0,
            ),
            objective=SequenceToSequence(),
            data=TextData(
                source=PairSource("data/tatoeba/pairs.tsv"),
                tokenizer=TokenizerConfig("unigram", vocab_size=4096),
                validation_fraction=0.1,
                shards=1,
            ),
            optimizer=AdamW(
                learning_rate=1e-3, b2=0.98, schedule=Schedule("linear", warmup_steps=100)
            ),
            phases=(Phase(steps=STEPS, sequence_length=64, batch_size=16),),
            checkpoints=CheckpointConfig(every_steps=STEPS),
            evaluation=Evaluation(every_steps=0),
            logging=Logging(every_steps=50, tensorboard=False),
        ),
        variants=VARIANTS,
        seeds=3,
        metric="eval/loss",
        published=(
            "held-out perplexity of English to German: base 4.92; 1, 4, 16 and 32 heads 5.29, "
            "5.00, 4.91 and 5.01; keys of width 16 and 32 (base: 64) 5.16 and 5.01; 2, 4 and 8 "
            "layers (base: 6) 6.11, 5.19 and 4.88; width 256 and 1,024 (base: 512) 5.75 and 4.66; "
            "feed-forward 1,024 and 4,096 (base: 2,048) 5.12 and 4.75; dropout 0 and 0.2 (base: "
            "0.1) 5.77 and 4.95; label smoothing 0 and 0.2 (base: 0.1) 4.67 and 5.47; learned "
            "positions 4.92"
        ),
        citation="Vaswani et al., Attention Is All You Need, arXiv:1706.03762, table 3",
        expected=(
            ("base", "heads_1"),
            ("base", "key_width_4"),
            ("layers_4", "base"),
            ("base", "layers_1"),
            ("width_256", "base"),
            ("base", "width_64"),
            ("feed_forward_1024", "base"),
            ("width_256", "layers_4"),
            ("base", "dropout_0"),
            ("smoothing_0", "base"),
        ),
    )
