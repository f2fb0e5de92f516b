"""Heads of models that were not trained here."""

from __future__ import annotations

import pytest

from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.distillation.objectives import DistilledImageClassification
from flax_transformers.errors import UserError
from flax_transformers.evaluation.prediction.heads import (
    Labels,
    RowFile,
    head_of,
    head_of_model,
)
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.testing import tiny_architecture, tiny_bert


@pytest.mark.parametrize(
    ("architecture", "kind", "framing"),
    [
        ("BertForSequenceClassification", "SequenceClassification", "bert"),
        ("RobertaForTokenClassification", "TokenClassification", "roberta"),
        ("XLMRobertaForQuestionAnswering", "QuestionAnswering", "roberta"),
        ("ModernBertForSequenceClassification", "SequenceClassification", "bert"),
        ("XLMRobertaForMultipleChoice", "MultipleChoice", "roberta"),
        ("GPT2ForSequenceClassification", "SequenceClassification", "gpt2"),
        ("Qwen2ForSequenceClassification", "SequenceClassification", "llama"),
        ("MistralForSequenceClassification", "SequenceClassification", "llama"),
        ("MixtralForSequenceClassification", "SequenceClassification", "llama"),
        ("MT5ForSequenceClassification", "SequenceClassification", "t5"),
        ("CLIPTextForSequenceClassification", "SequenceClassification", "bert"),
        ("BartForSequenceClassification", "SequenceClassification", "roberta"),
    ],
)
def test_a_published_head_is_read_with_the_special_tokens_of_its_family(
    architecture, kind, framing
):
    config = tiny_architecture(architecture)
    objective = head_of_model(config, "folder").objective
    assert (type(objective).__name__, objective.framing) == (kind, framing)


def test_one_label_is_a_number():
    config = tiny_bert(architecture="BertForSequenceClassification", num_labels=1)
    assert head_of_model(config, "folder").objective.loss == "mse"


def test_a_masked_language_model_has_no_head_to_predict_with():
    with pytest.raises(UserError, match="no head for labels.*; use --pool for embeddings"):
        head_of_model(tiny_bert(), "folder")


def test_an_objective_has_the_head_of_its_nearest_base_class():
    assert isinstance(head_of(DistilledImageClassification(teacher="runs/x")), Labels)
    assert head_of(MaskedLM()) is None


def test_fields_are_those_of_the_training_data_unless_they_are_given():
    source = LabelledSource("a.jsonl", text_field="said", second_field="answered")
    assert RowFile("b.jsonl", source).texts().fields == ("said", "answered")
    assert RowFile("b.jsonl", source).single_texts().fields == ("said",)
    assert RowFile("b.jsonl", source, "text", "more").texts().fields == ("text", "more")
    assert RowFile("b.jsonl").texts().fields == ("text",)


def test_one_text_of_each_row_has_no_second_field():
    with pytest.raises(UserError, match="--second-field is b, but one text of each row is read"):
        RowFile("b.jsonl", second_field="b").single_texts()
