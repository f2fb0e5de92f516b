import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import open_dataset, prepare
from flax_transformers.data.mixture import Component, MixedText, in_proportion
from flax_transformers.data.pipeline.examples import MixedExamples
from flax_transformers.data.pipeline.loader import TrainStream
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.testing import tiny_config
from flax_transformers.training.check_run import check_config
from flax_transformers.training.config import Evaluation
from tests.data.pipeline.test_loader import Numbers, joined, over_hosts, stream, take
from tests.data.prepare.test_text import write_corpus


def mixed(*counts, weights):
    names = "abcdefgh"[: len(counts)]
    return MixedExamples(tuple(names), tuple(map(Numbers, counts)), tuple(weights))


def test_any_stretch_of_the_stream_holds_its_share_of_each_part():
    examples = mixed(7, 500, 30, weights=(0.1, 0.65, 0.25))
    ids = joined(take(stream(examples, batch_size=50), 40))["example_id"]
    parts = np.array([examples.part_of(number) for number in ids])
    for start in range(0, 2000, 125):
        for part, weight in enumerate(examples.weights):
            assert abs((parts[start : start + 125] == part).sum() - 125 * weight) <= 3


def test_shares_are_exact_over_a_cycle_and_no_part_is_left_out():
    weights = (1e-9, 2e-9, 0.2, 0.8)
    counts = list(mixed(3, 3, 3, 3, weights=weights).consumed(1 << 16).values())
    assert sum(counts) == 1 << 16
    assert counts[:2] == [1, 1]
    assert counts[2] == pytest.approx(0.2 * (1 << 16), abs=2)


def test_each_part_gives_every_example_once_in_an_epoch_of_its_own_order():
    examples = mixed(10, 40, weights=(0.5, 0.5))
    ids = joined(take(stream(examples, batch_size=40), 2))["example_id"]
    small, large = ids[ids < 10], ids[ids >= 10]
    epochs = small.reshape(4, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert sorted(large) == list(range(10, 50))


def test_what_was_consumed_is_what_the_stream_gave():
    examples = mixed(5, 9, weights=(0.3, 0.7))
    position = (1 << 16) + 37
    counts = dict.fromkeys("ab", 0)
    ids = joined(take(stream(examples, batch_size=37, position=1 << 16), 1))["example_id"]
    for number in ids:
        counts["ab"[examples.part_of(number)]] += 1
    cycle = examples.consumed(1 << 16)
    assert examples.consumed(position) == {name: cycle[name] + counts[name] for name in counts}


def test_parts_of_equal_length_have_different_orders():
    examples = mixed(30, 30, weights=(0.5, 0.5))
    ids = joined(take(stream(examples, batch_size=60), 1))["example_id"]
    one, other = ids[ids < 30], ids[ids >= 30] - 30
    assert sorted(one) == sorted(other) == list(range(30)) and (one != other).any()


def test_a_part_goes_on_with_its_examples_when_the_order_of_parts_repeats():
    examples = mixed(10, 40, weights=(0.3, 0.7))
    for position in (5, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, (3 << 16) + 5):
        epoch, number = examples.locate(position, 0)
        part = examples.part_of(number)
        consumed = examples.consumed(position)["ab"[part]]
        assert epoch == consumed // len(examples.parts[part])


def test_a_mixture_is_the_same_stream_on_any_hosts_and_after_a_stop():
    examples = mixed(7, 23, 4, weights=(0.2, 0.5, 0.3))
    expected = over_hosts(1, 9, examples=examples)
    parts = [
        over_hosts(2, 3, examples=examples),
        over_hosts(4, 6, examples=examples, position=12),
    ]
    for name, array in joined(parts).items():
        np.testing.assert_array_equal(array, expected[name])


def test_another_part_does_not_change_the_order_of_the_others():
    def order(examples, name):
        ids = joined(take(stream(examples, batch_size=60), 1))["example_id"]
        part = examples.names.index(name)
        return [n - examples.starts[part] for n in ids if examples.part_of(n) == part][:15]

    two, three = mixed(20, 30, weights=(1, 1)), mixed(20, 30, 5, weights=(1, 1, 1))
    assert order(two, "b") == order(three, "b")


@pytest.fixture
def data(tmp_path):
    for name, documents in (("de", 40), ("en", 120)):
        write_corpus(tmp_path / f"{name}.jsonl", documents=documents, seed=documents)
    return MixedText(
        components=tuple(
            Component(name=name, source=TextSource(str(tmp_path / f"{name}.jsonl")))
            for name in ("de", "en")
        ),
        exponent=0.5,
        tokenizer=TokenizerConfig("wordpiece", vocab_size=60, lowercase=True),
        validation_fraction=0.2,
        store=str(tmp_path / "store"),
        shards=1,
    )


def test_components_are_drawn_by_their_smoothed_sizes_or_given_weights(data):
    prepared = prepare(data)
    sizes = np.array([part.train.num_tokens for part in prepared.parts])
    np.testing.assert_allclose(prepared.weights, sizes**0.5 / (sizes**0.5).sum())
    assert sizes[1] > 2 * sizes[0]
    one, other = data.components
    given = replace(data, components=(replace(one, weight=1.0), replace(other, weight=3.0)))
    reweighted = open_dataset(given)
    assert reweighted.weights == (0.25, 0.75)
    assert reweighted.fingerprint != prepared.fingerprint


def test_a_mixture_with_a_missing_component_is_found_before_anything_is_written(data):
    data.preparation().check()
    first, *others = data.components
    missing = replace(first, source=replace(first.source, path="nowhere.txt"))
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        replace(data, components=(missing, *others)).preparation().check()
    assert not Path(data.store).exists()


def test_a_component_more_rebuilds_no_other_store_and_keeps_the_tokenizer(data, tmp_path, capsys):
    before = prepare(data)
    written = {path: path.stat().st_mtime_ns for path in Path(data.store).rglob("*.tokens")}
    write_corpus(tmp_path / "fr.jsonl", documents=50, seed=5)
    more = Component(name="fr", source=TextSource(str(tmp_path / "fr.jsonl")))
    after = prepare(replace(data, components=(*data.components, more)))
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert "was not trained on fr" in capsys.readouterr().err
    assert [part.fingerprint for part in after.parts[:2]] == [p.fingerprint for p in before.parts]


def test_a_mixture_is_finished_with_its_last_component(data):
    assert not data.preparation().is_finished()
    prepared = prepare(data)
    assert data.preparation().is_finished()
    os.remove(f"{prepared.directory}/{data.components[-1].name}/manifest.json")
    assert not data.preparation().is_finished()


def test_another_tokenizer_in_the_same_place_is_refused(data):
    prepare(data)
    with pytest.raises(UserError, match="was made with .* this run asks for"):
        prepare(replace(data, tokenizer=replace(data.tokenizer, vocab_size=61)))
    Path(data.store, "mixture.json").write_text("[]")
    with pytest.raises(UserError, match=r"mixture.json in .* is damaged"):
        prepare(data)


def test_held_out_rows_are_those_of_every_component_once(data):
    prepared = prepare(data)
    spec = CausalLM().window_spec(16)
    held_out = prepared.examples("validation", spec)
    assert len(held_out) == sum(len(p.examples("validation", spec)) for p in prepared.parts)
    assert held_out.names == ("de", "en")


def test_pairs_of_many_languages_are_mixed_too(tmp_path):
    for name in ("de", "fr"):
        lines = [json.dumps({name: f"{name} {i}", "en": f"text {i}"}) + "\n" for i in range(30)]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    data = MixedText(
        components=tuple(
            Component(
                name=name,
                source=PairSource(f"{tmp_path}/{name}.jsonl", source_field=name, target_field="en"),
            )
            for name in ("de", "fr")
        ),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.0,
        store=str(tmp_path / "store"),
        shards=1,
    )
    prepared = prepare(data)
    objective = SequenceToSequence(pack=False)
    examples = prepared.examples("train", objective.window_spec(16))
    with TrainStream(
        examples, objective, prepared.vocabulary, sequence_length=16, batch_size=20, seed=0
    ) as batches:
        batch = next(batches)
    starts = [prepared.tokenizer.decode(row)[:2] for row in batch["input_ids"]]
    assert (starts.count("de"), starts.count("fr")) == (10, 10)


def test_training_texts_keep_to_the_shares_and_small_corpora_are_repeated():
    readers = [lambda: iter(["aa"] * 3), lambda: iter(["bbbb"] * 30)]
    texts = list(in_proportion(readers, (0.25, 0.75)))
    assert texts.count("bbbb") == 30
    assert texts.count("aa") == pytest.approx(20, abs=1)  # 40 of 160 characters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda parts: {"components": ()}, "components is empty"),
        (lambda parts: {"exponent": 1.5}, "exponent is 1.5"),
        (lambda parts: {"shards": 0}, "shards is 0"),
        (lambda parts: {"components": (parts[0], parts[0])}, "name is 'de'"),
        (lambda parts: {"components": (replace(parts[0], name="b/c"),)}, "name is 'b/c'"),
        (
            lambda parts: {"components": (replace(parts[0], weight=1.0), parts[1])},
            "'en' has no weight",
        ),
        (
            lambda parts: {"components": (replace(parts[0], weight=-2.0),)},
            "weight is -2.0; it must be positive",
        ),
    ],
)
def test_mixtures_that_cannot_be_are_refused(data, change, message):
    with pytest.raises(UserError, match=message):
        replace(data, **change(data.components))


def test_an_evaluation_set_is_not_called_as_a_component(data, tmp_path):
    source = TextSource(str(tmp_path / "de.jsonl"))
    config = tiny_config("text.txt", "store", data=data)
    good, bad = (
        replace(config, evaluation=Evaluation(sets=(EvaluationSet(name, source),)))
        for name in ("news", "de")
    )
    check_config(good)
    with pytest.raises(UserError, match="'de', as a component .*; give the set another name"):
        check_config(bad)


def labelled(path, names):
    rows = [{"text": f"text {n}", "label": names[n % len(names)]} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return LabelledSource(str(path))


def test_classes_of_some_components_do_not_matter_unless_all_have_some(tmp_path):
    write_corpus(tmp_path / "plain.jsonl", 20)
    plain = TextSource(str(tmp_path / "plain.jsonl"))
    good, other = (
        labelled(tmp_path / f"{names[0]}.jsonl", names) for names in (("a", "b"), ("c", "d"))
    )

    def made(*sources):
        components = [Component(name=f"n{i}", source=one) for i, one in enumerate(sources)]
        return MixedText(
            components=tuple(components), tokenizer=TokenizerConfig("bytes"), shards=1,
            validation_fraction=0.2, store=str(tmp_path / f"store{len(list(tmp_path.iterdir()))}"),
        )  # fmt: skip

    data = made(plain, good, other)
    prepared = prepare(data)
    assert prepared.label_names == ()
    held_out = data.of_evaluation_set(EvaluationSet("x", plain), prepared.label_names)
    assert prepare(held_out).validation.num_documents == 20
    assert prepare(made(good, good)).label_names == ("a", "b")
    with pytest.raises(UserError, match=r"'n1' has the classes 'c', 'd', but 'n0' has 'a', 'b'"):
        _ = prepare(made(good, other)).label_names


def second_of_mixture(**settings):
    one = Component(name="one", source=TextSource("a.txt"))
    return MixedText(components=(one, Component(name="two", **settings)))


@pytest.mark.parametrize("make", [TextData, second_of_mixture])
def test_held_out_data_with_other_labels_are_refused(make):
    plain, classes = TextSource("a.txt"), LabelledSource("a.jsonl")
    numbers = replace(classes, label="number")
    for source, held_out in ((plain, classes), (classes, plain), (classes, numbers)):
        with pytest.raises(UserError, match=r"validation_source \(a\.\w+\) has other labels, "):
            make(source=source, validation_source=held_out)
    assert make(source=PairSource("a.tsv"), validation_source=plain)
