"""BLEU, chrF and ROUGE of translations of held-out pairs.

BLEU (Papineni et al., 2002) and chrF (Popović, 2015) are sacrebleu's corpus scores, from 0 to 100.
References are decoded from the ids in the token store.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from etils import epath

from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.store.token_store import Split
from flax_transformers.errors import UserError
from flax_transformers.evaluation.scoring.rouge import rouge_scores
from flax_transformers.generation.program import arranged
from flax_transformers.generation.translate import generate_target
from flax_transformers.objectives.rows import end_id, start_id
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.storage.workdir import write_side_file
from flax_transformers.training.callbacks import Evaluator, Snapshot
from flax_transformers.training.config import TrainConfig

MAX_SCORED = 2_000
"""Largest number of held-out pairs that are translated."""
_BATCH_ROWS = 64
log = logging.getLogger(__name__)

Pair = tuple[np.ndarray, np.ndarray]
"""Ids of a source and of its target, int32 [n] and [m]."""


def can_score() -> bool:
    """Whether sacrebleu is installed."""
    return importlib.util.find_spec("sacrebleu") is not None


def scores(guesses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """``{"bleu": ..., "chrf": ...}``. Raises UserError if sacrebleu is not installed."""
    if not can_score():
        raise UserError("BLEU and chrF need sacrebleu; pip install 'flax_transformers[evaluation]'")
    import sacrebleu

    return {
        "bleu": sacrebleu.corpus_bleu(list(guesses), [list(references)]).score,
        "chrf": sacrebleu.corpus_chrf(list(guesses), [list(references)]).score,
    }


def pairs_of(config: TrainConfig, prepared: PreparedText, split: Split, most: int) -> list[Pair]:
    """The first ``most`` pairs of a split, truncated as in training; none without that split."""
    spec = config.objective.window_spec(config.phases[-1].sequence_length)
    examples = prepared.examples(split, dataclasses.replace(spec, cross_documents=False))
    if examples is None:
        return []
    rng = np.random.default_rng(0)  # nothing in a pair is random
    rows = (examples.read(number, rng) for number in range(min(most, len(examples))))
    return [(row["source_tokens"], row["target_tokens"]) for row in rows]


def decode_target(prepared: PreparedText) -> Callable[[Iterable[int]], str]:
    """The function that decodes the ids of a target."""
    return (prepared.target_tokenizer or prepared.tokenizer).decode


def translate(
    config: TrainConfig, prepared: PreparedText, model: nn.Module, params: Any, pairs: list[Pair]
) -> Iterator[np.ndarray]:
    """Translations of the sources of ``pairs``: int32 ids without the end token; greedy, unless the
    model's generation settings have beams."""
    objective, vocabulary = _objective(config), prepared.vocabulary
    params = arranged(params)  # once for all batches
    length = config.phases[-1].sequence_length
    target = vocabulary.of_targets
    end, start = end_id(target), [objective.first_id(target)]
    begin, target_begin = (
        [start_id(side)] if objective.begin else [] for side in (vocabulary, target)
    )
    for number in range(0, len(pairs), _BATCH_ROWS):
        some = pairs[number : number + _BATCH_ROWS]
        ids = np.full((_BATCH_ROWS, length), vocabulary.pad_id, np.int32)
        mask = np.zeros_like(ids)
        mask[:, 0] = 1  # padding rows of the last batch need one token
        for row, (source, _) in enumerate(some):
            text = np.concatenate([begin, source, [end_id(vocabulary)]]).astype(np.int32)
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        written = generate_target(
            model,
            params,
            ids,
            mask,
            max_new_tokens=objective.predictions(length) - len(start),
            start_ids=start,
            eos_id=end,
            pad_id=target.pad_id,
        )
        for row in jax.device_get(written)[: len(some)]:
            ends = np.flatnonzero(row == end)
            kept = row[: ends[0]] if len(ends) else row
            yield kept[kept != target_begin[0]] if target_begin else kept


def _objective(config: TrainConfig) -> SequenceToSequence:
    """The objective of a config that trains on pairs."""
    if not isinstance(config.objective, SequenceToSequence):
        raise TypeError(f"{type(config.objective).__name__} has no pairs to translate")
    return config.objective


def translation_evaluator(
    config: TrainConfig,
    prepared: PreparedText,
    model: nn.Module,
    at_step: int | None = None,
    folder: epath.Path | None = None,
) -> list[Evaluator]:
    """A function that gives ``{"eval/bleu", "eval/chrf"}`` and the scores of `rouge_scores` of the
    first held-out pairs, as ``translate`` translates them; none, and a log line, if sacrebleu is
    not installed.

    ``at_step``: score only after this step, because it takes long; None: at every evaluation.
    ``folder``: where the texts are written, one in each line, for scorers such as COMET (Rei et
    al., arXiv:2009.09025): ``step_....source.txt``, ``.hypothesis.txt`` and ``.reference.txt``.
    """
    if not can_score():
        log.info("BLEU, chrF and ROUGE are left out because sacrebleu is not installed")
        return []
    held_out = pairs_of(config, prepared, "validation", MAX_SCORED)

    def evaluate(snapshot: Snapshot) -> dict[str, float]:
        if not held_out or at_step not in (None, snapshot.step):
            return {}
        decode = decode_target(prepared)
        texts = list(map(decode, translate(config, prepared, model, snapshot.params, held_out)))
        references = [decode(target) for _, target in held_out]
        if folder is not None and jax.process_index() == 0:
            sources = [prepared.tokenizer.decode(source) for source, _ in held_out]
            sides = {"source": sources, "hypothesis": texts, "reference": references}
            for side, lines in sides.items():
                _write_lines(folder / f"step_{snapshot.step:08d}.{side}.txt", lines)
        found = scores(texts, references) | rouge_scores(texts, references)
        return {f"eval/{name}": score for name, score in found.items()}

    return [evaluate]


def _write_lines(path: epath.Path, texts: Sequence[str]) -> None:
    """Writes one text in each line; line ends inside become spaces."""
    write_side_file(path, "".join(" ".join(text.splitlines()) + "\n" for text in texts))
