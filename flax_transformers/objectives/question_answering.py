"""Answers that stand in a text: their first and last token (BERT, arXiv:1810.04805 §4.2, 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import (
    Array,
    Batch,
    ExampleView,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Vocabulary,
)
from flax_transformers.objectives.labelled import (
    Framing,
    LabelledSpec,
    framed,
    overhead,
)
from flax_transformers.objectives.rows import pad
from flax_transformers.ranges import Ranges


@dataclass(frozen=True)
class QuestionAnswering:
    """Mark the first and the last token of the answer to a question, in a text.

    The data are questions (`QuestionSource`). Rows are the question and then the text; a text that
    is too long goes through windows, a row each, which begin ``doc_stride`` tokens apart. Where the
    answer does not lie within a window, the first place of the row is right: "not here". Of several
    answers the first is learned. Defaults are those of BERT on SQuAD.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("answer_spans",), ("input_ids",))

    doc_stride: int = 128
    """Tokens from the beginning of one window to that of the next."""
    max_question_length: int = 64
    """Longer questions are cut; the metric "truncated" is the share of rows with one."""
    framing: Framing = "bert"
    """What stands around question and text: that of the model's family."""
    max_answer_length: int = 30
    """In scoring: no answer has more tokens."""
    best: int = 20
    """In scoring: so many answers to a question are kept, the likeliest first."""
    no_answer: bool = False
    """In scoring: whether "no answer" is an answer (SQuAD 2.0)."""
    null_threshold: float = 0.0
    """In scoring: "no answer" has to be better than the best answer by more than this, in logits.
    """

    RANGES: ClassVar[Ranges] = {
        "doc_stride": ranges.POSITIONS,
        "max_question_length": ranges.POSITIONS,
        "max_answer_length": ranges.POSITIONS,
        "best": ranges.integers(1, 10_000),
        "null_threshold": ranges.numbers(-1e6, 1e6),
    }

    def __post_init__(self) -> None:
        ranges.check_fields(self, "objective")

    def window_spec(self, sequence_length: int) -> LabelledSpec:
        length = sequence_length - overhead(self.framing, 2)
        if length <= self.max_question_length:
            raise UserError(
                f"rows of {sequence_length} tokens hold no text beside questions of "
                f"{self.max_question_length} (objective.max_question_length); use longer sequences"
            )
        return LabelledSpec(
            length,
            cross_documents=False,
            rows="answers",
            labels="spans",
            stride=self.doc_stride,
            question_length=self.max_question_length,
        )

    def predictions(self, sequence_length: int) -> int:
        """Every place may begin an answer."""
        return sequence_length

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        """One row of ``question_tokens`` and ``tokens`` int32, those of the text from token
        ``offset`` on, with the answers ``spans`` int32 [answers, 2], counted in the whole text;
        nothing in it is random.

        ``input_ids``, ``attention_mask`` and, with BERT's framing, ``token_type_ids`` int32 [T];
        ``start`` and ``end`` int32 [], the places of the answer's first and last token;
        ``context_start``, ``context_end`` and ``context_offset`` int32 [], the places where the
        text begins and ends and the number of its first token here; ``weights`` and ``truncated``
        float32 [].
        """
        question = example["question_tokens"][: self.max_question_length]
        ids, types, (_, first) = framed([question, example["tokens"]], self.framing, vocab)
        start, end = 0, 0
        offset = int(example["offset"])
        if len(example["spans"]):
            begin, last = (example["spans"][0] - offset).tolist()
            if begin >= 0 and last < len(example["tokens"]):
                start, end = first + begin, first + last
        row = {
            "input_ids": pad(ids, sequence_length, vocab.pad_id),
            "attention_mask": pad(np.ones(len(ids), np.int32), sequence_length, 0),
            "start": np.array(start, np.int32),
            "end": np.array(end, np.int32),
            "context_start": np.array(first, np.int32),
            "context_end": np.array(first + len(example["tokens"]), np.int32),
            "context_offset": np.array(offset, np.int32),
            "weights": np.array(1, np.float32),
            "truncated": np.array(len(question) < len(example["question_tokens"]), np.float32),
        }
        if self.framing == "bert":
            row["token_type_ids"] = pad(types, sequence_length, 0)
        return row

    def terms(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> LossTerms:
        """The loss "answer", the mean of both ends' cross-entropies; that and the accuracies of the
        ends as metrics."""
        import jax.numpy as jnp  # here, so that data workers start without jax

        from flax_transformers.objectives.cross_entropy import cross_entropy

        logits_BT2 = self._logits(model, params, batch, rngs)
        starts = cross_entropy(logits_BT2[..., 0], batch["start"])
        ends = cross_entropy(logits_BT2[..., 1], batch["end"])
        weights_B = batch["weights"]
        count = jnp.sum(weights_B)
        loss = jnp.sum(0.5 * (starts.nll + ends.nll) * weights_B)
        return LossTerms(
            losses={"answer": (loss, count, 1.0)},
            metrics={
                "loss": (loss, count),
                "start_accuracy": (jnp.sum(starts.correct * weights_B), count),
                "end_accuracy": (jnp.sum(ends.correct * weights_B), count),
                "truncated": (jnp.sum(batch["truncated"]), count),
            },
        )

    def predict(self, model: ModelFunctions, params: Params, batch: Batch) -> dict[str, Array]:
        """``logits`` float32 [B, T, 2] of first and last tokens, with where the text stands in the
        row and the batch's ``weights``."""
        logits_BT2 = self._logits(model, params, batch, {})
        names = ("context_start", "context_end", "context_offset", "weights")
        return {"logits": logits_BT2, **{name: batch[name] for name in names}}

    def _logits(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> Array:
        """The lowest float32 at padding, which is no answer."""
        import jax.numpy as jnp

        hidden_BTD = model.hidden_states(params, batch, rngs).last_hidden_state
        logits_BT2 = model.head("answer_spans", params, rngs, hidden_BTD)
        place_1T = jnp.arange(logits_BT2.shape[1])[None]
        possible_BT1 = ((batch["attention_mask"] > 0) | (place_1T == 0))[:, :, None]
        return jnp.where(possible_BT1, logits_BT2, jnp.finfo(jnp.float32).min)

    def show(self, row: dict[str, np.ndarray]) -> list[ExampleView]:
        used = int(row["attention_mask"].sum())
        ids, places = row["input_ids"][:used], np.arange(used)
        inside = (places >= row["start"]) & (places <= row["end"])
        labels = np.where(inside, ids, -1).astype(np.int32)
        segments = (places >= row["context_start"]).astype(np.int32)
        note = "" if row["end"] else "no answer here"
        return [ExampleView("question", ids, labels, segments, note)]
