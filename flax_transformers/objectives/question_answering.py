"""Extractive question answering (BERT, arXiv:1810.04805 sections 4.2 and 4.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flax_transformers import ranges
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import (
    Array,
    Arrays,
    Batch,
    ExampleView,
    LossTerms,
    ModelFunctions,
    ModelNeeds,
    Params,
    Rng,
    Rngs,
    Vocabulary,
)
from flax_transformers.objectives.labelled import (
    Framing,
    FramingMixin,
    LabelledSpec,
    framed,
    overhead,
)
from flax_transformers.objectives.rows import padded_tokens


@dataclass(frozen=True)
class QuestionAnswering(FramingMixin):
    """Predict the first and the last token of the answer to a question in a text.

    The data are questions (`QuestionSource`). An example is the question followed by the text. A
    text that is too long becomes several examples, whose windows begin ``doc_stride`` tokens apart.
    If the answer is not within a window, its label is the first position. Of several answers, the
    first is the label. Defaults are those of BERT on SQuAD.
    """

    needs: ClassVar[ModelNeeds] = ModelNeeds(("answer_spans",), ("input_ids",))

    doc_stride: int = 128
    """Number of tokens between the starts of windows."""
    max_question_length: int = 64
    """Longer questions are truncated; the metric "truncated" is the share of such examples."""
    framing: Framing = "bert"
    """Special tokens around question and text: those of the model's family."""
    max_answer_length: int = 30
    """Maximum number of tokens of an answer in evaluation."""
    best: int = 20
    """Number of answers to a question that are kept in evaluation, the likeliest first."""
    no_answer: bool = False
    """Whether "no answer" is an answer in evaluation (SQuAD 2.0)."""
    null_threshold: float = 0.0
    """Margin in logits by which "no answer" must exceed the best answer in evaluation."""

    RANGES: ClassVar[ranges.Ranges] = {
        "doc_stride": ranges.POSITIONS,
        "max_question_length": ranges.POSITIONS,
        "max_answer_length": ranges.POSITIONS,
        "best": ranges.integers(1, 10_000),
        "null_threshold": ranges.numbers(-1e6, 1e6),
    }

    def window_spec(self, sequence_length: int) -> LabelledSpec:
        length = sequence_length - overhead(self.framing, 2)
        if length <= self.max_question_length:
            raise UserError(
                f"sequences of {sequence_length} tokens are too short for a text and questions of "
                f"{self.max_question_length} (objective.max_question_length); use longer ones"
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
        """Every position can begin an answer."""
        return sequence_length

    def prepare(self, example: Arrays, rng: Rng, vocab: Vocabulary, sequence_length: int) -> Arrays:
        """Prepare ``question_tokens`` and ``tokens`` int32, which are those of the text from token
        ``offset`` on, with the answers ``spans`` int32 [answers, 2] in the whole text; not random.

        ``input_ids``, ``attention_mask`` and, with BERT's framing, ``token_type_ids`` int32 [T];
        ``start`` and ``end`` int32 [], the positions of the first and last token of the answer;
        ``context_start``, ``context_end`` int32 [], the positions where the text begins and ends;
        ``context_offset`` int32 [], the number of its first token in the whole text; ``weights``
        and ``truncated`` float32 [].
        """
        question = example["question_tokens"][: self.max_question_length]
        ids, types, (_, first) = framed([question, example["tokens"]], self.framing, vocab)
        start, end = 0, 0
        offset = int(example["offset"])
        if len(example["spans"]):
            begin, last = (example["spans"][0] - offset).tolist()
            if begin >= 0 and last < len(example["tokens"]):
                start, end = first + begin, first + last
        token_types = types if self.framing == "bert" else None
        return padded_tokens(ids, sequence_length, vocab, token_types) | {
            "start": np.array(start, np.int32),
            "end": np.array(end, np.int32),
            "context_start": np.array(first, np.int32),
            "context_end": np.array(first + len(example["tokens"]), np.int32),
            "context_offset": np.array(offset, np.int32),
            "weights": np.array(1, np.float32),
            "truncated": np.array(len(question) < len(example["question_tokens"]), np.float32),
        }

    def terms(self, model: ModelFunctions, params: Params, batch: Batch, rngs: Rngs) -> LossTerms:
        """The loss "answer", the mean cross-entropy of start and end; it, their accuracies and
        "truncated" are the metrics."""
        import jax.numpy as jnp  # not at the top: data workers must not import jax

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
        """``logits`` float32 [B, T, 2] of first and last tokens; the positions of the text and
        ``weights`` of the batch."""
        logits_BT2 = self._logits(model, params, batch, {})
        names = ("context_start", "context_end", "context_offset", "weights")
        return {"logits": logits_BT2, **{name: batch[name] for name in names}}

    def _logits(
        self, model: ModelFunctions, params: Params, batch: Batch, rngs: Mapping[str, Array]
    ) -> Array:
        """Logits [B, T, 2] of first and last tokens, the lowest float32 at padding."""
        import jax.numpy as jnp

        hidden_BTD = model.hidden_states(params, batch, rngs).last_hidden_state
        logits_BT2 = model.head("answer_spans", params, rngs, hidden_BTD)
        position_1T = jnp.arange(logits_BT2.shape[1])[None]
        possible_BT1 = ((batch["attention_mask"] > 0) | (position_1T == 0))[:, :, None]
        return jnp.where(possible_BT1, logits_BT2, jnp.finfo(jnp.float32).min)

    def example_views(self, row: Arrays) -> list[ExampleView]:
        used = int(row["attention_mask"].sum())
        ids, positions = row["input_ids"][:used], np.arange(used)
        inside = (positions >= row["start"]) & (positions <= row["end"])
        labels = np.where(inside, ids, -1).astype(np.int32)
        segments = (positions >= row["context_start"]).astype(np.int32)
        note = "" if row["end"] else "no answer in this window"
        return [ExampleView("question", ids, labels, segments, note)]
