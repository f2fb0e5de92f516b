"""Files are chosen by the split that they are named by."""

from __future__ import annotations

import json

import pytest

from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.read import not_read, read_documents
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.errors import UserError
from flax_transformers.post_training.conversations import ConversationSource

IMDB = ("train-00000-of-00001", "test-00000-of-00001", "unsupervised-00000-of-00001")
CHAT = ("train_sft-00000-of-00001", "test_sft-00000-of-00001", "train_gen-00000-of-00001")
DOLLY = ("dolly-train-00000-of-00001", "dolly-test-00000-of-00001", "a.test_sft-00000-of-00001")


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f'{{"text": "{name}", "label": "x"}}\n')


def names(folder, split="train", source=TextSource):
    return [path.relative_to(folder).as_posix() for _, path in source(str(folder), split).files()]


@pytest.mark.parametrize(
    ("files", "split", "read"),
    [
        (IMDB, "train", IMDB[:1]),
        (IMDB, "test", IMDB[1:2]),
        (IMDB, "unsupervised", IMDB[2:]),
        (CHAT, "test_sft", CHAT[1:2]),
        (DOLLY, "train", DOLLY[:1]),
        (DOLLY, "test", DOLLY[1:2]),
        (DOLLY, "test_sft", DOLLY[2:]),
        (("c4-train.00000-of-00512", "c4-validation.00000-of-00008"), "train", None),
        (("train", "dev"), "train", None),
        (("train", "dev"), "validation", ("dev",)),
        (("train", "heldout"), "heldout", ("heldout",)),
        (("train_1", "train_2", "eval"), "train", ("train_1", "train_2")),
        (("data/train/0", "data/test/0", "data/test/train"), "train", None),
        (("test-0", "test-1"), "train", ("test-0", "test-1")),  # one split, which is meant
        (("part-00000-of-00002", "part-00001-of-00002"), "train", "all"),
        (("de-00000-of-00001", "en-00000-of-00001"), "train", "all"),
        (("about", "test", "training"), "train", "all"),  # texts, of which some have such names
        (("about", "test"), "test", ("test",)),
    ],
)
def test_files_are_chosen_by_the_split_in_their_names(files, split, read, tmp_path):
    make(tmp_path, *(f"{name}.jsonl" for name in files))
    chosen = {None: files[:1], "all": files}.get(read, read)
    assert names(tmp_path, split) == [f"{name}.jsonl" for name in chosen]
    pattern = TextSource(f"{tmp_path}/**/*.jsonl", split).files()
    assert [path for _, path in pattern] == [tmp_path / f"{name}.jsonl" for name in chosen]


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (IMDB, "banana", "no files of the split 'banana', only of 'test', 'train', 'unsup"),
        (CHAT, "train", "of the split 'train', only of 'test_sft', 'train_gen', 'train_sft'; n"),
        (("test", "dev"), "train", "no files of the split 'train', only of 'test', 'validation'"),
        (("a", "b"), "test", "'test', as none is named by a split; leave out the source's split"),
        (("a",), "test", "no files of the split 'test', as none"),
    ],
)
def test_a_split_without_files_is_refused_with_those_that_there_are(
    files, split, message, tmp_path
):
    make(tmp_path, *(f"{name}.jsonl" for name in files))
    with pytest.raises(UserError, match=message):
        names(tmp_path, split)


@pytest.mark.parametrize("ending", ["txt", "jsonl", "json", "csv", "tsv", "parquet"])
@pytest.mark.parametrize(
    "source", [TextSource, LabelledSource, PairSource, TaggedSource, ConversationSource]
)
def test_every_source_and_kind_of_file_is_chosen_by_split(source, ending, tmp_path):
    if f".{ending}" not in source.endings:
        ending = "conllu" if source is TaggedSource else "jsonl"
    make(tmp_path, *(f"en-ud-{split}.{ending}" for split in ("train", "dev", "test")))
    for split in ("train", "dev", "test"):
        assert names(tmp_path, split, source) == [f"en-ud-{split}.{ending}"]


def test_a_file_or_folder_that_is_named_by_the_split_is_read(tmp_path):
    make(tmp_path, "test/0000.jsonl", "other/dev.jsonl")
    for path in ("test", "test/0000.jsonl", "test/*.jsonl"):
        assert len(TextSource(f"{tmp_path}/{path}", "test").files()) == 1
    assert TextSource(f"{tmp_path}/other/dev.jsonl", "validation").files()
    assert TextSource(f"{tmp_path}/other/dev.jsonl").files()


def test_the_splits_in_a_json_file_are_its_own(tmp_path):
    rows = {split: [{"text": split, "label": 0}] for split in ("train", "test")}
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    make(tmp_path, "more.jsonl")
    for path in (tmp_path, (tmp_path / "rows.json").rename(tmp_path / "train_and_test.json")):
        found = read_documents(LabelledSource(str(path), "test"))
        assert [document.text for _, document in found] == [("test",)]


@pytest.mark.parametrize("name", ["rows", "train"])
def test_json_files_of_a_folder_have_no_split_but_theirs(name, tmp_path):
    rows = [{"text": "a"}]
    lists = (json.dumps(rows), json.dumps({"data": rows}), '{"text": "a"}\n{"text": "b"}\n')
    path = tmp_path / f"{name}.json"
    for text in lists:
        path.write_text(text)
        assert list(read_documents(TextSource(str(tmp_path))))
        with pytest.raises(UserError, match=r"json has no split 'test', and no splits at all"):
            list(read_documents(TextSource(str(tmp_path), "test")))


@pytest.mark.parametrize(
    "text",
    ['{"text": "@", "label": 0}\n{"text": "@", "label": 1}\n', '[{"text": "@", "label": 0}]'],
)
def test_folders_above_the_corpus_do_not_name_its_split(text, tmp_path):
    corpus = tmp_path / "dev" / "project"
    corpus.mkdir(parents=True)
    for name in ("train", "test"):
        (corpus / f"{name}.json").write_text(text.replace("@", name))
    for path in (corpus, corpus / "test.json", corpus / "*.json"):
        found = read_documents(LabelledSource(str(path), "test"))
        assert {document.text for _, document in found} == {("test",)}


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "train.json", "dev/rows.jsonl"])
def test_one_file_without_splits_inside_is_read_whole(name, tmp_path):
    make(tmp_path, name)
    found = read_documents(TextSource(str(tmp_path / name), "test_sft"))
    assert [document.text for _, document in found] == [name]


def test_questions_have_no_splits_inside(tmp_path):
    make(tmp_path, "squad.json")
    with pytest.raises(UserError, match="no files of the split 'test'"):
        names(tmp_path, "test", QuestionSource)


def test_files_of_other_splits_are_counted_as_not_read(tmp_path):
    make(tmp_path, "train.jsonl", "test.jsonl", "dev.jsonl")
    size = (tmp_path / "train.jsonl").stat().st_size
    read, unread = not_read(LabelledSource(str(tmp_path)))
    assert read == size
    assert unread["other-split file"] == (2, 2 * size - 3)  # of the names in the texts
