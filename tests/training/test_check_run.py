"""Config, model and data are compared before the first step; nothing here is compiled."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.families.bart import BartConfig
from flax_transformers.families.bert import BertConfig
from flax_transformers.families.gpt2 import GPT2Config
from flax_transformers.families.marian import MarianConfig
from flax_transformers.families.roberta import RobertaConfig
from flax_transformers.families.t5 import T5Config
from flax_transformers.families.vit import ViTConfig
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.denoising import Denoising
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.next_sentence import NextSentence
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.objectives.span_corruption import SpanCorruption
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.testing import tiny_config
from flax_transformers.training.check_run import check_batch_values, check_config, check_run
from flax_transformers.training.config import ImagePhase, Phase

SMALL = {
    "hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8,
    "vocab_size": 60, "max_positions": 64, "pad_id": 0,
}  # fmt: skip
VOCABULARY = Vocabulary(
    size=60, pad_id=0, unk_id=1, cls_id=2, sep_id=3, mask_id=4,
    special_ids=(0, 1, 2, 3, 4), word_start=np.ones(60, bool),
)  # fmt: skip
ROBERTA = RobertaConfig(**SMALL, position_offset=1, architecture="RobertaForSequenceClassification")
PAIRS = TextData(
    source=LabelledSource("pairs.jsonl", second_field="hypothesis"),
    tokenizer=TokenizerConfig("bytes"),
)
SINGLE = dataclasses.replace(PAIRS, source=LabelledSource("texts.jsonl"))
QUESTIONS = TextData(source=QuestionSource("squad.json"), tokenizer=TokenizerConfig("bytes"))
TRANSLATIONS = TextData(source=PairSource("pairs.tsv"), tokenizer=TokenizerConfig("bytes"))
IMAGES = ImageData(source=ImageSource("images"), channels=3)


def prepared(vocabulary=VOCABULARY, label_names=()):
    return SimpleNamespace(vocabulary=vocabulary, label_names=label_names)


def config_of(model, objective, data=None, **changes):
    data = data or TextData(tokenizer=TokenizerConfig("bytes"))
    return tiny_config("x", "store", model=model, objective=objective, data=data, **changes)


def qa(**changes):
    kind = "RobertaForQuestionAnswering"
    model = dataclasses.replace(ROBERTA, architecture=kind)
    return config_of(model, QuestionAnswering(max_question_length=8, **changes), QUESTIONS)


@pytest.mark.parametrize(
    "config",
    [
        config_of(ROBERTA, SequenceClassification(), PAIRS),
        qa(),
    ],
)
def test_token_types_beyond_the_table_are_refused_before_any_data_are_read(config):
    with pytest.raises(UserError, match="token_type_ids up to 1, but model.token_types is 1; set "):
        check_config(config)


@pytest.mark.parametrize(
    "config",
    [
        config_of(ROBERTA, SequenceClassification(framing="roberta"), PAIRS),
        config_of(ROBERTA, SequenceClassification(), SINGLE),
        config_of(
            BertConfig(**SMALL, architecture="BertForSequenceClassification"),
            SequenceClassification(),
            PAIRS,
        ),
        qa(framing="roberta"),
    ],
)
def test_token_types_within_the_table_are_taken(config):
    check_config(config)


def test_sentence_pairs_need_a_table_of_two_types():
    model = BertConfig(**SMALL, token_types=1, architecture="BertForPreTraining")
    with pytest.raises(UserError, match="token_type_ids up to 1.* set --model.token-types 2"):
        check_config(config_of(model, NextSentence()))


@pytest.mark.parametrize(
    ("model", "objective", "data", "says"),
    [
        (
            BartConfig(**SMALL | {"max_positions": 32}, eos_ids=(3,), decoder_start_id=3),
            SequenceToSequence(target_length=33),
            TRANSLATIONS,
            "decoder_input_ids of 33 tokens at sequence_length 32, but model.max_positions allows",
        ),
        (
            dataclasses.replace(ROBERTA, num_labels=2),
            SequenceClassification(loss="mse"),
            dataclasses.replace(SINGLE, source=LabelledSource("t.jsonl", label="number")),
            "of one number, but model.num_labels is 2; set --model.num-labels 1",
        ),
        (
            ROBERTA,
            SequenceClassification(),
            TextData(source=TextSource("x.txt"), tokenizer=TokenizerConfig("bytes")),
            "learns the labels 'classes', which the TextSource of x.txt does not give",
        ),
        (
            BartConfig(**SMALL),
            SequenceToSequence(),
            None,
            "learns pairs, which the TextSource of embedded does not give; set data.source to a P",
        ),
        (
            ViTConfig(hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8),
            ImageClassification(),
            None,
            "objective ImageClassification learns from ImageData, but data is a TextData",
        ),
        (
            BertConfig(**SMALL),
            MaskedLM(),
            IMAGES,
            "objective MaskedLM learns from text, but data is a ImageData",
        ),
        (BertConfig(**SMALL), CausalLM(), None, "is for a model that sees only what came before"),
        (
            BertConfig(**SMALL),
            MaskedLM(),
            TextData(tokenizer=TokenizerConfig(vocab_size=61)),
            "data.tokenizer.vocab_size is 61, but model.vocab_size is 60; set --data.tokenizer.voc",
        ),
        (
            MarianConfig(**SMALL, share_embeddings=False, decoder_vocab_size=50),
            SequenceToSequence(),
            dataclasses.replace(TRANSLATIONS, target_tokenizer=TokenizerConfig(vocab_size=51)),
            "target_tokenizer.vocab_size is 51, but model.decoder_vocab_size is 50; set --data.ta",
        ),
        (
            BartConfig(**SMALL),
            SequenceToSequence(),
            dataclasses.replace(TRANSLATIONS, target_tokenizer=TokenizerConfig(vocab_size=61)),
            "target_tokenizer.vocab_size is 61, but model.vocab_size is 60; .* larger model.vocab",
        ),
    ],
)
def test_contradictions_of_the_config_are_refused(model, objective, data, says):
    with pytest.raises(UserError, match=says):
        check_config(config_of(model, objective, data))


def test_only_tokenizers_of_tables_that_the_model_has_are_compared():
    large = TokenizerConfig(vocab_size=61)

    class Data(TextData):
        """With a tokenizer that no table of the model belongs to."""

        @property
        def tokenizers(self):
            return {"tokenizer": self.tokenizer, "target_tokenizer": large, "third": large}

    data = Data(tokenizer=TokenizerConfig("bytes"))
    check_config(config_of(BertConfig(**SMALL), MaskedLM(), data))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"init_from": ""}, "init_from"),
        ({"data": TextData(source=TextSource(""))}, "data.source.path"),
        ({"data": TextData(store="")}, "data.store"),
        ({"data": TextData(tokenizer=TokenizerConfig(path=""))}, "data.tokenizer.path"),
    ],
)
def test_an_empty_path_is_refused(changes, name):
    with pytest.raises(UserError, match=f"^{name} is empty; give the path, or leave it out"):
        check_config(config_of(BertConfig(**SMALL), MaskedLM(), **changes))


@pytest.mark.parametrize("objective", ["x", object, MaskedLM, None, AdamW()])
def test_what_is_no_objective_is_refused(objective):
    with pytest.raises(
        UserError, match="^objective is .*it must be a dataclass with window_spec, pred"
    ):
        config_of(BertConfig(**SMALL), objective)


@pytest.mark.parametrize("optimizer", ["x", 3 + 4j, AdamW, None, MaskedLM()])
def test_what_is_no_optimizer_is_refused(optimizer):
    with pytest.raises(UserError, match="^optimizer is .*; it must be a dataclass with make"):
        config_of(BertConfig(**SMALL), MaskedLM(), optimizer=optimizer)


@pytest.mark.parametrize("schedule", ["x", -1, {}, (0,), None, Schedule, MaskedLM()])
def test_what_is_no_schedule_is_refused(schedule):
    with pytest.raises(UserError, match="^optimizer.schedule is .*; it must be a dataclass with m"):
        AdamW(schedule=schedule)


@pytest.mark.parametrize("vocab_size", [1, 3, 7, 8])
def test_a_model_of_a_few_tokens_is_taken(vocab_size):
    check_config(config_of(BertConfig(**SMALL | {"vocab_size": vocab_size}), MaskedLM()))


@pytest.mark.parametrize(
    ("model", "objective", "taken"),
    [
        (BertConfig(**SMALL), MaskedLM(), 2),
        (BartConfig(**SMALL), Denoising(), 2),
        (GPT2Config(**SMALL), CausalLM(), 1),
    ],
)
def test_sequences_that_only_hold_special_tokens_are_refused(model, objective, taken):
    config = config_of(model, objective)
    short = dataclasses.replace(config.phases[0], sequence_length=taken)
    with pytest.raises(
        UserError, match=f"special tokens of {type(objective).__name__} take {taken}"
    ):
        check_config(dataclasses.replace(config, phases=(short,)))


def test_a_warm_up_longer_than_the_run_is_refused():
    optimizer = AdamW(schedule=Schedule(warmup_steps=21))
    with pytest.raises(UserError, match="warmup_steps is 21, but the run has 20 steps in all"):
        check_config(config_of(BertConfig(**SMALL), MaskedLM(), optimizer=optimizer))
    check_config(config_of(BertConfig(**SMALL), MaskedLM(), optimizer=optimizer), trains=False)


@pytest.mark.parametrize(
    ("image_size", "channels", "says"),
    [
        (32, 1, "data.channels is 1, but model.num_channels is 3; set --data.channels 3"),
        (40, 3, "of which patches of model.patch_size 16 leave out 8 pixels .* set it to 32 or 48"),
        (8, 3, "phases.image_size is 8, less than one patch of model.patch_size 16; set it to 16"),
    ],
)
def test_images_that_the_model_does_not_take_are_refused(image_size, channels, says):
    model = ViTConfig(hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8, image_size=32)
    phase = ImagePhase(steps=9, image_size=image_size, batch_size=8)
    data = dataclasses.replace(IMAGES, channels=channels)
    with pytest.raises(UserError, match=says):
        check_config(config_of(model, ImageClassification(), data, phases=(phase,)))


def gpt2(**changes):
    fields = {"bos_id": None, "eos_ids": (3,)} | changes
    return config_of(GPT2Config(**SMALL, **fields), CausalLM())


def bart(**changes):
    fields = {"bos_id": None, "eos_ids": (3,), "decoder_start_id": 3} | changes
    return config_of(BartConfig(**SMALL, **fields), Denoising())


def t5(**changes):
    fields = {k: v for k, v in SMALL.items() if k != "max_positions"} | {"eos_ids": (3,)}
    return config_of(T5Config(**fields | changes), SpanCorruption())


SENTINELS = dataclasses.replace(VOCABULARY, sentinel_ids=tuple(range(59, 30, -1)))


@pytest.mark.parametrize(
    ("config", "vocabulary", "says"),
    [
        (
            config_of(BertConfig(**SMALL), MaskedLM()),
            dataclasses.replace(VOCABULARY, size=61, word_start=np.ones(61, bool)),
            "the tokenizer has 61 tokens, but model.vocab_size is 60; set --model.vocab-size 61",
        ),
        (
            config_of(BertConfig(**SMALL | {"pad_id": 7}), MaskedLM()),
            VOCABULARY,
            "pads with id 0, but model.pad_id is 7.*set --model.pad-id 0",
        ),
        (
            config_of(BertConfig(**SMALL), MaskedLM()),
            dataclasses.replace(VOCABULARY, mask_id=None),
            r"the tokenizer has no \[MASK\]",
        ),
        (
            config_of(BertConfig(**SMALL), MaskedLM()),
            dataclasses.replace(VOCABULARY, cls_id=None),
            r"the tokenizer has no \[CLS\] and \[SEP\]",
        ),
        (gpt2(eos_ids=(5,)), VOCABULARY, r"ends a text with id 3, but model.eos_ids is \(5,\)"),
        (gpt2(bos_id=60), VOCABULARY, "model.bos_id is 60, but the tokenizer has 60 tokens"),
        (
            gpt2(bos_id=6),
            dataclasses.replace(VOCABULARY, bos_id=5),
            "begins a text with id 5, but model.bos_id is 6; set --model.bos-id 5",
        ),
        (
            gpt2(eos_ids=(5,), bos_id=60),
            VOCABULARY,
            "would end there, and model.bos_id is 60.*; set --model.eos-ids 3 --model.bos-id",
        ),
        (
            bart(decoder_start_id=2),
            VOCABULARY,
            "the decoder's rows begin with id 3, but model.decoder_start_id is 2; set --model.dec",
        ),
        (t5(), VOCABULARY, "need .* sentinels, the tokenizer has 0"),
        (t5(decoder_start_id=5), SENTINELS, "begin with id 0, but model.decoder_start_id is 5"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(config, vocabulary, says):
    with pytest.raises(UserError, match=says):
        check_run(config, prepared(vocabulary))


@pytest.mark.parametrize(
    ("config", "vocabulary"),
    [
        (config_of(BertConfig(**SMALL), MaskedLM()), VOCABULARY),
        (gpt2(), VOCABULARY),
        (bart(), VOCABULARY),
        (t5(), SENTINELS),
    ],
)
def test_a_tokenizer_that_fits_is_taken(config, vocabulary):
    check_config(config)
    check_run(config, prepared(vocabulary))


def test_another_number_of_classes_is_refused():
    config = config_of(ROBERTA, SequenceClassification(framing="roberta"), SINGLE)
    check_run(config, prepared(label_names=("no", "yes")))
    with pytest.raises(UserError, match="the data has 3 classes, but model.num_labels is 2"):
        check_run(config, prepared(label_names=("no", "perhaps", "yes")))


TRANSLATOR = MarianConfig(
    **SMALL, decoder_vocab_size=30, share_embeddings=False, eos_ids=(1,), decoder_start_id=0
)


def ended(size, pad_id=0, target=None):
    return Vocabulary(size, pad_id, eos_id=1, special_ids=(0, 1), target=target)


@pytest.mark.parametrize(
    ("changes", "target", "said"),
    [
        (
            {"share_embeddings": True, "decoder_vocab_size": None},
            ended(30),
            "one embedding table for both sides; set --model.share-embeddings False",
        ),
        ({}, ended(31), "31 tokens, but model.decoder_vocab_size is 30; set"),
        ({}, None, "60 tokens, but model.decoder_vocab_size is 30; set"),
        ({}, ended(30, 5), "pads with id 0 and that of the targets with 5"),
    ],
)
def test_two_vocabularies_that_do_not_fit_the_model_are_refused(changes, target, said):
    model = dataclasses.replace(TRANSLATOR, **changes)
    config = config_of(model, SequenceToSequence(), TRANSLATIONS)
    with pytest.raises(UserError, match=said):
        check_run(config, prepared(ended(60, target=target)))


def test_two_vocabularies_that_fit_are_taken():
    config = config_of(TRANSLATOR, SequenceToSequence(), TRANSLATIONS)
    check_run(config, prepared(ended(60, target=ended(30))))


def batch_of(**changes):
    ids = np.zeros((2, 32), np.int32)
    return {"input_ids": ids, "token_type_ids": ids, "weights": np.ones(2, np.float32)} | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"input_ids": np.full((2, 32), 60, np.int32)},
            "makes input_ids up to 60, but model.vocab_size is 60",
        ),
        ({"input_ids": np.full((2, 32), -1, np.int32)}, "makes input_ids down to -1"),
        (
            {"input_ids": np.zeros((2, 65), np.int32)},
            "input_ids of 65 tokens .*max_positions allows 64",
        ),
        ({"token_type_ids": np.full((2, 32), 2, np.int32)}, "token_type_ids up to 2, but"),
        ({"masked_labels": np.full((2, 3), 60, np.int32)}, "makes masked_labels up to 60"),
        ({"weights": np.array([1, np.nan], np.float32)}, "weights of the rows .* not all finite"),
    ],
)
def test_a_first_batch_with_what_the_model_has_no_place_for_is_refused(changes, says):
    config = config_of(BertConfig(**SMALL), MaskedLM())
    check_batch_values(config, Phase(1, 32, 2), batch_of())
    with pytest.raises(UserError, match=says):
        check_batch_values(config, Phase(1, 32, 2), batch_of(**changes))


def test_a_class_beyond_the_head_is_refused():
    config = config_of(ROBERTA, SequenceClassification(framing="roberta"), SINGLE)
    with pytest.raises(UserError, match="a class of number 2, but model.num_labels is 2"):
        check_batch_values(config, Phase(1, 32, 2), {"labels": np.array([0, 2], np.int32)})
