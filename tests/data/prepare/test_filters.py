import json
from dataclasses import replace
from pathlib import Path

import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.prepare import duplicates as duplicates_module
from flax_transformers.data.prepare.filters import Filters
from flax_transformers.data.sources.squad import Question
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return TextSource(str(path))


def texts_of(prepared, store):
    ends = store.document_ends.tolist()
    return [
        prepared.tokenizer.decode(store.tokens(start, end - start))
        for start, end in zip([0, *ends], ends, strict=False)
    ]


@pytest.fixture
def data(tmp_path):
    return TextData(
        source=write(tmp_path / "corpus.jsonl", ["one", "two", "three", "one", "o ne", "four"]),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.0,
        store=str(tmp_path / "store"),
        shards=2,
    )


def manifest(data):
    return json.loads(Path(data.store, "manifest.json").read_text())


def test_by_default_every_text_is_kept(data):
    prepared = prepare(data)
    assert prepared.train.num_documents == 6
    assert set(manifest(data)["left_out"].values()) == {0}


def test_too_short_or_too_long_documents_are_left_out_and_counted(data, capsys):
    prepared = prepare(replace(data, filters=Filters(min_characters=4, max_characters=4)))
    assert sorted(texts_of(prepared, prepared.train)) == ["four", "o ne"]
    left_out = manifest(data)["left_out"]
    assert (left_out["short"], left_out["long"]) == (3, 1)
    assert "0 invalid ones, 3 too short, 1 too long)" in capsys.readouterr().err


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_of_equal_texts_the_first_stays_whatever_the_shards(data, tmp_path, shards):
    texts = ["b c", "a", " b\n\tc ", "d", "a", "bc", "b\tc"]
    source = write(tmp_path / "corpus.jsonl", texts)
    data = replace(data, source=source, shards=shards, filters=Filters(drop_duplicates=True))
    prepared = prepare(data)
    assert sorted(texts_of(prepared, prepared.train)) == ["a", "b c", "bc", "d"]
    assert manifest(data)["left_out"]["duplicates"] == 3
    left = sorted(path.name for path in Path(data.store, "duplicates").iterdir())
    assert left == [*(f"{shard:05d}.repeats" for shard in range(shards)), "by_shard"]


def test_what_is_in_the_validation_source_is_not_trained_on(data, tmp_path):
    held_out = write(tmp_path / "held_out.jsonl", ["two", "five", "two"])
    prepared = prepare(
        replace(data, validation_source=held_out, filters=Filters(drop_duplicates=True))
    )
    assert sorted(texts_of(prepared, prepared.train)) == ["four", "o ne", "one", "three"]
    assert sorted(texts_of(prepared, prepared.validation)) == ["five", "two"]


def test_duplicates_are_found_a_slice_of_all_hashes_at_a_time(data, monkeypatch):
    monkeypatch.setattr(duplicates_module, "_AT_ONCE", 1)
    prepared = prepare(replace(data, filters=Filters(drop_duplicates=True)))
    assert sorted(texts_of(prepared, prepared.train)) == ["four", "o ne", "one", "three", "two"]


def test_a_damaged_list_of_duplicates_is_refused(data):
    data = replace(data, filters=Filters(drop_duplicates=True))
    prepare(data)
    Path(data.store, "manifest.json").unlink()
    Path(data.store, "shards/00001.json").unlink()
    path = Path(data.store, "duplicates/00001.repeats")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"duplicates/00001.repeats in .* was damaged"):
        prepare(data)
    assert prepare(data).train.num_documents == 5


def test_filters_that_keep_nothing_are_refused_with_the_counts(data):
    with pytest.raises(UserError, match=r"no document is left \(0 empty .*, 6 too short\)"):
        prepare(replace(data, filters=Filters(min_characters=100)))


@pytest.mark.parametrize(
    "fields",
    [{"min_characters": -1}, {"max_characters": 0}, {"min_characters": 5, "max_characters": 4}],
)
def test_limits_that_cannot_be_are_refused(fields):
    with pytest.raises(UserError, match="_characters is "):
        Filters(**fields)


def test_questions_with_other_answers_are_no_repeats():
    asked = Question(("Which?", "one two"), answers=((0, 3),))
    hashes = {
        duplicates_module._hash(one)
        for one in (asked, replace(asked, name="b"), replace(asked, answers=((4, 7),)))
    }
    assert len(hashes) == 2


def test_an_empty_validation_source_is_refused(data, tmp_path):
    empty = write(tmp_path / "held_out.jsonl", ["", " "])
    with pytest.raises(UserError, match="held_out.jsonl is empty, or nothing of it is left"):
        prepare(replace(data, validation_source=empty))
