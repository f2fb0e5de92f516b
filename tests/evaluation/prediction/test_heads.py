"""Heads of models that were not trained here."""

from __future__ import annotations

import numpy as np
import pytest

from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.distillation.objectives import DistilledImageClassification
from flax_transformers.errors import UserError
from flax_transformers.evaluation.prediction.heads import (
    Labels,
    Predicted,
    RowFile,
    head_of,
    head_of_model,
)
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.sequence_classification import SequenceClassification
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


LOGITS = [{"logits": np.array([[3.0, 1.0, -1.0]], np.float32)}]


def three_labels(problem_type):
    return tiny_bert(
        architecture="BertForSequenceClassification", num_labels=3, problem_type=problem_type
    )


def test_several_numbers_of_a_published_model_have_names():
    config = three_labels("regression")
    found = head_of_model(config, "folder").lines(Predicted(config, None, LOGITS))
    assert found == [{"values": {"LABEL_0": 3.0, "LABEL_1": 1.0, "LABEL_2": -1.0}}]


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_labels_of_a_run_are_those_of_its_objective_whatever_its_weights_were_before(problem):
    head = head_of(SequenceClassification())
    found = head.lines(Predicted(three_labels(problem), None, LOGITS))
    assert found == head.lines(Predicted(three_labels(None), None, LOGITS))
    assert sum(found[0]["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)


def test_the_loss_of_sigmoids_leaves_an_image_one_label():
    objective = ImageClassification(loss="sigmoid")
    logits = [{"logits": np.array([[-1.0, -3.0, -5.0]], np.float32)}]
    (line,) = head_of(objective).lines(Predicted(three_labels(None), None, logits))
    shares = {"LABEL_0": 0.268941, "LABEL_1": 0.0474259, "LABEL_2": 0.00669285}
    assert line == {"label": "LABEL_0", "probability": 0.268941, "probabilities": shares}


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
