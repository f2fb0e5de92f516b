"""Training data from Python sequences and generators."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import grain
import numpy as np
import pytest

from flax_transformers.data.dataset import (
    GeneratorBatches,
    PythonData,
    SequenceDataset,
    open_dataset,
    prepare,
    training_examples,
)
from flax_transformers.data.pipeline.loader import TrainStream, ordered_batches
from flax_transformers.data.sequences import raw_example
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.image_classification import ImageClassification
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.next_sentence import NextSentence
from flax_transformers.objectives.prefix_lm import PrefixLM
from flax_transformers.objectives.sequence_classification import SequenceClassification

TEXTS = [f"Text number {n} is read. Then comes the next." for n in range(12)]
ROWS = [{"input_ids": np.full(4, n, np.int32), "labels": np.array(n)} for n in range(12)]

FRAMED = Vocabulary(size=300, pad_id=0, cls_id=1, sep_id=2, mask_id=3, eos_id=4)


def stream(data, objective=None, **changes):
    objective = objective or CausalLM()
    examples = training_examples(data, objective.window_spec(32))
    settings = {"sequence_length": 32, "batch_size": 4, "seed": 0, **changes}
    return TrainStream(examples, objective, data.vocabulary, **settings)


def take(batches, count):
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("items", [TEXTS, [{"text": text} for text in TEXTS]])
def test_texts_are_tokenized_for_the_objective(items):
    data = SequenceDataset(items, tokenizer=ByteTokenizer())
    first = next(stream(data))
    text = ByteTokenizer().decode(first["input_ids"][0])
    assert TEXTS[first["example_id"][0]].startswith(text)


def test_prepared_rows_reach_the_batch_unchanged():
    batch = next(stream(SequenceDataset(ROWS, prepared=True)))
    for number, ids in zip(batch["example_id"], batch["input_ids"], strict=True):
        np.testing.assert_array_equal(ids, ROWS[number]["input_ids"])
    assert set(batch) == {"input_ids", "labels", "example_id"}


def test_each_epoch_contains_each_item_once_in_another_order():
    batches = take(stream(SequenceDataset(ROWS, prepared=True)), 6)
    first, second = np.split(np.concatenate([batch["example_id"] for batch in batches]), 2)
    assert sorted(first) == sorted(second) == list(range(12))
    assert (first != second).any()


@pytest.mark.parametrize("make", [list, grain.MapDataset.source])
def test_a_stream_resumes_at_any_position(make):
    data = SequenceDataset(make(ROWS), prepared=True)
    whole = take(stream(data), 5)
    resumed = take(stream(data, position=8), 3)
    for one, other in zip(whole[2:], resumed, strict=True):
        np.testing.assert_array_equal(one["input_ids"], other["input_ids"])


def test_pairs_of_texts_come_from_different_items():
    data = SequenceDataset(TEXTS, tokenizer=ByteTokenizer())
    examples = training_examples(data, NextSentence().window_spec(32))
    numbers = set()
    for seed in range(100):
        example = examples.read(3, np.random.default_rng(seed))
        assert not np.array_equal(example["tokens"], example["other_tokens"])
        text = ByteTokenizer().decode(example["other_tokens"])
        numbers.add(int(text.removeprefix("Text number ").split()[0]))
    assert numbers == set(range(len(TEXTS))) - {3}


@pytest.mark.parametrize("objective", [CausalLM(), PrefixLM()])
def test_a_text_that_is_cut_does_not_end(objective):
    spec = objective.window_spec(9)
    (text,) = ByteTokenizer().encode_batch(["A cut text"])
    cut, whole = (raw_example(one, spec, ByteTokenizer()) for one in ("A cut text", "A cut te"))
    np.testing.assert_array_equal(cut["tokens"], text[:8])
    assert cut["document_ends"].dtype == np.int32
    assert (cut["document_ends"].tolist(), whole["document_ends"].tolist()) == ([], [8])
    vocab = ByteTokenizer().vocabulary
    for example, ends in ((cut, 0), (whole, 1)):
        row = objective.prepare(example, np.random.default_rng(0), vocab, 9)
        assert (row["labels"] == vocab.end_id).sum() == ends


@pytest.mark.parametrize(
    ("text", "sentences", "kept", "ends"),
    [
        ("One. Two. Three.", 2, [5, 10], []),
        ("One. Two.", 2, [5, 9], [9]),
        ("One. Two. Three is longer than the row.", None, [5, 10], []),
        ("This sentence is longer than the row.", None, [], []),
    ],
)
def test_a_text_for_pairs_of_sentences_is_cut_after_a_sentence(text, sentences, kept, ends):
    spec = NextSentence(single_sentences=sentences is not None).window_spec(32)
    example = raw_example(text, spec, ByteTokenizer())
    assert len(example["tokens"]) == (kept[-1] if kept else spec.length)
    assert example["sentence_ends"].tolist() == kept
    assert example["document_ends"].tolist() == ends


@pytest.mark.parametrize("objective", [ImageClassification(mixup=0.8), NextSentence()])
def test_held_out_texts_come_in_pairs_and_held_out_images_alone(objective):
    images = [{"image": np.full((4, 4, 3), n, np.uint8), "label": np.array(n)} for n in range(5)]
    items = images if isinstance(objective, ImageClassification) else TEXTS
    data = SequenceDataset(items, items, tokenizer=ByteTokenizer())
    spec = objective.window_spec(32)
    train, held_out = (data.examples(split, spec) for split in ("train", "validation"))
    pairs = [
        any(name.startswith("other_") for name in examples.read(0, np.random.default_rng(0)))
        for examples in (train, train.plain, held_out)
    ]
    assert pairs == [True, items is TEXTS, items is TEXTS]


def test_evaluation_reads_each_held_out_item_once():
    data = SequenceDataset(ROWS, validation=ROWS[:5], prepared=True)
    examples = data.examples("validation", CausalLM().window_spec(4))
    batches = ordered_batches(
        examples, CausalLM(), data.vocabulary, sequence_length=4, batch_size=2, seed=0
    )
    numbers = np.concatenate([batch["example_id"] for batch in batches])
    assert numbers.tolist() == [0, 1, 2, 3, 4, -1]


def test_a_run_resumes_only_with_a_sequence_of_the_same_name_and_length():
    prints = {
        SequenceDataset(ROWS).fingerprint,
        SequenceDataset(ROWS[1:]).fingerprint,
        SequenceDataset(ROWS, name="other").fingerprint,
    }
    assert len(prints) == 3
    assert SequenceDataset(list(ROWS)).fingerprint in prints


@pytest.mark.parametrize("items", [["text"], [3], [{"text": ""}]])
def test_items_that_are_no_examples_raise(items):
    tokenizer = None if items == ["text"] else ByteTokenizer()
    with pytest.raises(UserError):
        next(stream(SequenceDataset(items, tokenizer=tokenizer)))


def test_a_model_with_fewer_embeddings_leaves_the_vocabulary_whole():
    data = SequenceDataset(TEXTS, tokenizer=ByteTokenizer())
    assert data.fitted(100, -1, 100).vocabulary == data.vocabulary
    ids = SequenceDataset(TEXTS, vocab=Vocabulary(size=50, pad_id=2, has_pad=False))
    fitted = ids.fitted(40, 55, 40).vocabulary, ids.fitted(60, 55, 60).vocabulary
    assert [(one.size, one.pad_id) for one in fitted] == [(50, 0), (50, 55)]


def generated(items, **changes):
    settings = {"sequence_length": 4, "batch_size": 3, "prepared": True, **changes}
    return GeneratorBatches(lambda: iter(items), CausalLM(), ByteTokenizer().vocabulary, **settings)


def test_a_generator_is_read_in_its_order_and_starts_again_at_its_end():
    batches = generated(ROWS[:4])
    labels = [batch["labels"].tolist() for batch in take(batches, 3)]
    assert labels == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]


def test_hosts_read_their_own_rows_of_a_generator():
    assert next(generated(ROWS, rows=[1, 2]))["labels"].tolist() == [1, 2]


def test_a_generator_says_that_it_cannot_resume(caplog):
    with caplog.at_level(logging.WARNING):
        batches = generated(ROWS, position=6)
    assert "cannot resume at example 6" in caplog.text
    assert next(batches)["labels"].tolist() == [0, 1, 2]


def test_an_empty_generator_raises():
    with pytest.raises(UserError, match="yields nothing"):
        next(generated([]))


@pytest.mark.parametrize("objective", [ImageClassification(mixup=0.8), NextSentence()])
def test_a_generator_without_second_examples_is_refused_where_they_are_needed(objective):
    images = isinstance(objective, ImageClassification)
    image = {"image": np.zeros((32, 32, 3), np.uint8), "label": np.array(1)}
    item = image if images else {"tokens": np.array([5, 6]), "sentence_ends": np.array([1, 2])}
    item |= {} if images else {"document_ends": np.array([2])}
    both = item | {f"other_{name}": value for name, value in item.items()}
    settings = {"sequence_length": 32, "batch_size": 2, "tokenizer": ByteTokenizer()}
    vocab = ByteTokenizer().vocabulary
    assert next(GeneratorBatches(lambda: iter([both]), objective, vocab, **settings))
    for items in ([item], [image if images else TEXTS[0]]):
        batches = GeneratorBatches(lambda items=items: iter(items), objective, vocab, **settings)
        with pytest.raises(UserError, match="draws a second example for each"):
            next(batches)


@dataclass(frozen=True, kw_only=True)
class Rows(PythonData):
    """As a config file of the user's may define it."""

    count: int = 12

    def load(self):
        return SequenceDataset(ROWS[: self.count], prepared=True)


def test_data_of_a_config_file_is_loaded_instead_of_prepared():
    spec = CausalLM().window_spec(4)
    data = Rows(count=7)
    for dataset in (prepare(data), open_dataset(data)):
        assert len(training_examples(dataset, spec)) == 7
    assert data.has_prepared_rows
    np.testing.assert_array_equal(data.dummy_example(spec, 0)["input_ids"], ROWS[0]["input_ids"])


def test_data_of_a_config_file_without_examples_raises():
    with pytest.raises(UserError, match="no training examples"):
        Rows(count=0).dummy_example(CausalLM().window_spec(4), 0)


@pytest.mark.parametrize("objective", [CausalLM(), MaskedLM()])
@pytest.mark.parametrize("name", ["tokens", "input_ids"])
def test_ids_alone_are_one_text(name, objective):
    tokens = [ids[:20] for ids in ByteTokenizer().encode_batch(TEXTS)]
    vocab = FRAMED
    given = SequenceDataset([{name: ids, "attention_mask": ids > 0} for ids in tokens], vocab=vocab)
    ends = [np.array([len(ids)], np.int32) for ids in tokens]
    whole = [
        {"tokens": ids, "document_ends": end, "sentence_ends": end}
        for ids, end in zip(tokens, ends, strict=True)
    ]
    expected = next(stream(SequenceDataset(whole, vocab=vocab), objective))
    found = next(stream(given, objective))
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_ids_are_cut_and_tokens_that_do_not_fit_are_refused():
    ids = np.arange(5, 105, dtype=np.int32)
    data = SequenceDataset([{"input_ids": ids}] * 4, vocab=FRAMED)
    row = next(stream(data))["input_ids"][0]
    assert row.tolist() == [4, *ids[:30], 0]  # as a text that does not end
    with pytest.raises(UserError, match=r"has 100 tokens, but \d+ fit into a sequence; cut its"):
        next(stream(SequenceDataset([{"tokens": ids}] * 4, vocab=FRAMED)))


def test_rows_of_texts_and_labels_are_classified():
    rows = [{"text": text, "label": n % 3} for n, text in enumerate(TEXTS)]
    data = SequenceDataset(rows, tokenizer=ByteTokenizer())
    objective = SequenceClassification(framing="gpt2")
    batch = next(stream(data, objective))
    assert batch["labels"].tolist() == [n % 3 for n in batch["example_id"]]
    text = ByteTokenizer().decode(batch["input_ids"][0])
    assert text == TEXTS[batch["example_id"][0]][: len(text)] and len(text) == 32
    named = SequenceDataset([{"text": "one", "label": "good"}], tokenizer=ByteTokenizer())
    with pytest.raises(UserError, match=r"has the label 'good'; give the number of its class"):
        next(stream(named, objective))


@pytest.mark.parametrize(
    ("item", "lacks"),
    [({"text": "one"}, "labels"), ({"image": np.zeros(2)}, "tokens"), ("one", "labels")],
)
def test_what_an_example_lacks_is_named(item, lacks):
    data = SequenceDataset([item] * 4, tokenizer=ByteTokenizer())
    with pytest.raises(UserError, match=f"has no '{lacks}', which the objective reads; it has '"):
        next(stream(data, SequenceClassification(framing="gpt2")))
