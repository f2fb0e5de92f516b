"""A store is identified by the content of its corpus, not by paths or times."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import flax_transformers as ft
from flax_transformers.cli.main import main
from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import open_dataset, prepare, prepare_common, prepare_share
from flax_transformers.data.images import dataset, parts, sources
from flax_transformers.data.images import files as image_files
from flax_transformers.data.mixture import Component, MixedText
from flax_transformers.data.prepare import text as prepare_module
from flax_transformers.data.sources import records
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.read import CorpusReader
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.store import tokenizer as store_tokenizer_module
from flax_transformers.data.store.files import DIGEST, sealed
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.runtime import prepared_data
from flax_transformers.storage import file_hashes as content_module
from flax_transformers.storage.file_hashes import content_digest
from flax_transformers.testing import tiny_config
from tests.data.images.test_dataset import data as image_data
from tests.data.images.test_dataset import read_all, write_folder, write_idx
from tests.data.prepare.test_text import files

WORDPIECE = TokenizerConfig("wordpiece", vocab_size=60)


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def corpus(tmp_path):
    root = tmp_path / "corpus"
    root.mkdir()
    for part in range(2):
        lines = [f"A model reads text {n} and learns.\n\n" for n in range(part, 60, 2)]
        (root / f"part{part}.txt").write_text("".join(lines))
    return root


def data_of(path, tokenizer=WORDPIECE, **changes):
    settings = {"validation_fraction": 0.2, "shards": 2, "prepare_processes": 1, **changes}
    return TextData(source=TextSource(str(path)), tokenizer=tokenizer, **settings)


def mixed(root, tokenizer=WORDPIECE):
    """The two files of the corpus as components of a mixture."""
    components = tuple(
        Component(name=name, source=TextSource(f"{root}/{name}.txt")) for name in ("part0", "part1")
    )
    return MixedText(
        components=components,
        tokenizer=tokenizer,
        store="store",
        shards=1,
        validation_fraction=0.0,
    )


def _touched(root):
    for file in root.iterdir():
        os.utime(file, (1, 1))
    return root


def _linked(root):
    os.symlink(root, root.parent / "link")
    return root.parent / "link"


def _moved(root):
    return root.rename(root.parent / "elsewhere")


def _renamed_files(root):
    for file in sorted(root.iterdir()):
        file.rename(root / f"renamed_{file.name}")
    return root


SPELLINGS = {
    "touched": _touched,
    "copied": lambda root: shutil.copytree(root, root.parent / "copy"),
    "moved": _moved,
    "linked": _linked,
    "relative": lambda root: root.name,
    "with a slash": lambda root: f"{root}/",
    "from above": lambda root: root.parent / "x" / ".." / root.name,
    "below home": lambda root: f"~/{root.name}",
    "as a pattern": lambda root: root / "*.txt",
    "with renamed files": _renamed_files,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_corpus_of_the_same_bytes_is_the_same_corpus(corpus, tmp_path, spelling):
    given, default = (prepare(data_of(corpus, store=store)) for store in ("store", None))
    (tmp_path / "x").mkdir()
    path = SPELLINGS[spelling](corpus)
    for opening in (prepare, open_dataset):
        for store, made in (("store", given), (None, default)):
            again = opening(data_of(path, store=store))
            assert again.directory == made.directory
            assert again.fingerprint == made.fingerprint
            assert again.tokenizer.fingerprint == made.tokenizer.fingerprint


def test_a_single_file_may_have_another_name(tmp_path):
    (tmp_path / "a.txt").write_text("One text.\n\nAnd another.\n")
    first = data_of("a.txt").preparation().folder.path
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert data_of("b.txt").preparation().folder.path == first
    (tmp_path / "b.txt").rename(tmp_path / "b.jsonl")  # is read in another way
    assert data_of("b.jsonl").preparation().folder.path != first


def test_other_bytes_of_the_same_size_and_time_are_another_corpus(corpus):
    made = prepare(data_of(corpus))
    file = corpus / "part0.txt"
    status = file.stat()
    file.write_text(file.read_text().replace("model", "robot"))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = prepare(data_of(corpus))
    assert again.directory != made.directory
    assert again.fingerprint != made.fingerprint


@pytest.fixture
def questions(tmp_path):
    """Questions whose store is of the version before; and its folder in the cache."""
    answers = [{"text": "reads", "answer_start": 8}]
    articles = [
        {"paragraphs": [{"context": f"A model reads {n}.", "qas": [
            {"id": str(n), "question": "What does it do?", "answers": answers}
        ]}]}
        for n in range(12)
    ]  # fmt: skip
    (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
    data = data_of("squad.json", TokenizerConfig("bytes"))
    data = replace(data, source=QuestionSource("squad.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(QuestionSource, "store_version", 1)
        return data, prepare(data)


def test_a_new_run_gets_a_store_of_the_new_version(questions, caplog):
    data, earlier = questions
    assert prepare(data).directory != earlier.directory and not caplog.text
    assert "store_version" not in json.dumps(data_of("squad.json").origin.settings)


def test_a_run_on_a_store_of_an_earlier_version_keeps_it(questions, caplog):
    data, earlier = questions
    of_run = {"tokenizer": earlier.tokenizer}
    for same in (data, replace(data, store=earlier.directory)):
        for opening in (prepare, open_dataset):
            assert opening(same, of_run=of_run).directory == earlier.directory
    assert "was made by an earlier version" in caplog.text
    held_out = data.of_evaluation_set(EvaluationSet(name="other", source=data.source))
    caplog.clear()
    assert prepare(held_out, of_run=of_run).directory != earlier.directory and not caplog.text
    new = prepare(data)
    assert prepare(data, of_run=of_run).directory == new.directory  # as new runs have to
    other = SimpleNamespace(fingerprint="0123")
    assert not Path(data.preparation(of_run={"tokenizer": other}).folder.path).exists()


def test_a_run_on_a_store_of_any_earlier_version_keeps_it(questions, monkeypatch):
    data, earlier = questions
    of_run = {"tokenizer": earlier.tokenizer}
    second = prepare(data)
    monkeypatch.setattr(QuestionSource, "store_version", 3)
    assert prepare(data, of_run=of_run).directory == second.directory
    shutil.rmtree(second.directory)
    assert prepare(data, of_run=of_run).directory == earlier.directory


def test_a_store_of_an_earlier_version_is_enough_when_its_corpus_is_gone(questions, caplog):
    data, earlier = questions
    os.remove("squad.json")
    assert prepare(data).fingerprint == earlier.fingerprint
    assert "was made by an earlier version" in caplog.text


def test_unfinished_work_of_an_earlier_version_is_not_resumed(questions, monkeypatch):
    data = replace(questions[0], store="store")
    with monkeypatch.context() as patch:
        patch.setattr(QuestionSource, "store_version", 1)
        prepare_common(data)
    with pytest.raises(UserError, match="by an earlier version and is not finished; delete it"):
        prepare(data)


@pytest.mark.parametrize("store", ["store", None])
def test_a_finished_store_is_enough_when_its_corpus_is_gone(corpus, store):
    made = prepare(data_of(corpus, store=store))
    shutil.rmtree(corpus)
    for opening in (prepare, open_dataset):
        assert opening(data_of(corpus, store=store)).fingerprint == made.fingerprint


def _forbid(monkeypatch, forbidden):
    """As for a user who may not look into a folder, on Python 3.11."""

    def guarded(method):
        def call(path, *arguments, **options):
            if path.is_relative_to(forbidden):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return method(path, *arguments, **options)

        return call

    for name in ("exists", "is_dir", "is_file", "iterdir", "stat"):
        monkeypatch.setattr(Path, name, guarded(getattr(Path, name)))


@pytest.mark.parametrize("pattern", ["", "part?.txt"])
@pytest.mark.parametrize("store", ["store", None])
def test_a_finished_store_is_enough_for_who_may_not_look_into_its_corpus(
    corpus, store, pattern, monkeypatch
):
    data = data_of(corpus / pattern, store=store)
    made = prepare(data)
    _forbid(monkeypatch, corpus)
    for opening in (prepare, open_dataset):
        assert opening(data).fingerprint == made.fingerprint
    with pytest.raises(UserError, match="Cannot read .*corpus.*Permission denied"):
        prepare(replace(data, store="new"))


def test_a_finished_store_is_enough_for_who_may_not_look_into_its_pairs(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.de").write_text("Katze\nBaum\nBuch\n" * 20)
    (tmp_path / "texts/a.en").write_text("cat\ntree\nbook\n" * 20)
    source = PairSource("texts/a.de", target_path="texts/a.en")
    data = replace(
        data_of("", TokenizerConfig("bytes"), validation_fraction=0.0), source=source, store="store"
    )
    made = prepare(data)
    _forbid(monkeypatch, "texts")
    for opening in (prepare, open_dataset):
        assert opening(data).fingerprint == made.fingerprint


@pytest.mark.parametrize("store", ["store", None])
def test_a_finished_store_is_enough_for_who_may_not_look_into_its_images(
    tmp_path, store, monkeypatch
):
    write_idx(tmp_path / "mnist")
    data = image_data("mnist", store=store)
    made = prepare(data)
    _forbid(monkeypatch, "mnist")
    for opening in (prepare, open_dataset):
        assert opening(data).fingerprint == made.fingerprint


def test_opening_a_finished_store_reads_nothing_of_the_corpus(corpus, monkeypatch):
    data = data_of(corpus, store="store")
    made = prepare(data)
    monkeypatch.delattr(content_module, "_sha256")
    monkeypatch.delattr(CorpusReader, "__init__")
    for opening in (prepare, open_dataset):
        assert opening(data).fingerprint == made.fingerprint


def test_a_corpus_that_grew_is_refused_by_prepare_but_does_not_stop_a_run(corpus, caplog):
    data = data_of(corpus, store="store")
    made = prepare(data)
    with (corpus / "part1.txt").open("a") as file:
        file.write("One text more.\n")
    with pytest.raises(UserError, match=rf"made with corpus .*{corpus}.* have changed since"):
        prepare(data)
    assert prepare(data, compare="nothing").fingerprint == open_dataset(data).fingerprint
    assert open_dataset(data).fingerprint == made.fingerprint and not caplog.records
    assert prepare(data, compare="warning").fingerprint == made.fingerprint
    assert "have changed since" in caplog.text and "It is used as it is." in caplog.text


def test_prepare_compares_the_content_when_it_is_asked_to(corpus):
    data = data_of(corpus, store="store")
    made = prepare(data)
    assert prepare(data, compare="content").fingerprint == made.fingerprint
    file = corpus / "part1.txt"
    file.write_text(file.read_text().replace("learns", "forget"))  # of the same size
    assert prepare(data).fingerprint == made.fingerprint
    with pytest.raises(UserError, match=rf"made with corpus .*{corpus}.* have changed since"):
        prepare(data, compare="content")
    shutil.rmtree(corpus)
    assert prepare(data, compare="content").fingerprint == made.fingerprint


def test_a_store_may_be_copied_or_moved(corpus, tmp_path):
    made = prepare(data_of(corpus, store="store"))
    shutil.copytree("store", "copy")
    assert prepare(data_of(corpus, store="copy")).fingerprint == made.fingerprint
    os.rename("store", "moved")
    for store in ("moved", str(tmp_path / "moved") + "/", f"file://{tmp_path}/moved"):
        for opening in (prepare, open_dataset):
            assert opening(data_of(corpus, store=store)).fingerprint == made.fingerprint


def test_a_store_prepared_again_elsewhere_has_the_same_bytes(corpus, tmp_path):
    one = prepare(data_of(corpus, TokenizerConfig("bytes"), store="one"))
    copy = _touched(shutil.copytree(corpus, tmp_path / "machine" / "text"))
    other = prepare(data_of(copy, TokenizerConfig("bytes"), store="other"))
    assert files("one") == files("other")
    assert one.fingerprint == other.fingerprint


def test_unfinished_work_resumes_when_the_corpus_has_moved(corpus, tmp_path):
    data = data_of(corpus, TokenizerConfig("bytes"), store="store")
    prepare_common(data)
    assert prepare_share(data, None, 0, 2) is None
    moved = data_of(_touched(_moved(corpus)), TokenizerConfig("bytes"), store="store")
    before = Path("store/shards/00000.json").stat().st_mtime_ns
    assert prepare_share(moved, None, 1, 2) is not None
    assert Path("store/shards/00000.json").stat().st_mtime_ns == before
    prepare(replace(moved, store="whole"))
    assert files("store") == files("whole")


@pytest.mark.parametrize("jobs", [None, 2])
def test_a_corpus_that_changes_while_it_is_prepared_makes_no_store(corpus, monkeypatch, jobs):
    data = data_of(corpus, store="store")
    write = prepare_module.write_shards

    def replaced(*arguments):
        write(*arguments)
        file = corpus / "part1.txt"
        status = file.stat()
        file.write_text(file.read_text().replace("learns", "forget"))  # of the same size
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))

    prepare_common(data)
    if jobs:
        prepare_share(data, None, 0, jobs)
    monkeypatch.setattr(prepare_module, "write_shards", replaced)
    with pytest.raises(UserError, match=f"{corpus} changed while it was prepared, .*delete that"):
        prepare(data) if jobs is None else prepare_share(data, None, 1, jobs)
    assert not Path("store/manifest.json").exists()


def files_hashed(monkeypatch):
    read, hashed = [], content_module._sha256
    monkeypatch.setattr(content_module, "_sha256", lambda path: read.append(path) or hashed(path))
    return read


def test_jobs_read_the_corpus_for_its_identity_once(corpus, monkeypatch):
    data, read = data_of(corpus, store="store"), files_hashed(monkeypatch)
    prepare_common(data)
    assert len(read) == 2  # each file
    prepare_share(data, None, 0, 2)
    assert len(read) == 2
    prepare_share(data, None, 1, 2)
    assert len(read) == 6  # when the store is finished: compared, and noted


def test_content_is_hashed_once_in_a_process_where_the_cache_cannot_be_written(
    corpus, tmp_path, monkeypatch
):
    (tmp_path / "cache").write_text("in the way")
    read = files_hashed(monkeypatch)
    monkeypatch.setattr(content_module, "_SETTLED_S", -1.0)
    paths = [(path.name, path) for path in sorted(corpus.iterdir())]
    assert len({content_digest(paths) for _ in range(3)}) == 1
    assert len(read) == 2
    os.utime(paths[0][1])
    content_digest(paths)
    assert len(read) == 4


def test_content_is_hashed_again_only_when_a_file_changed(corpus, monkeypatch):
    paths = [(path.name, path) for path in sorted(corpus.iterdir())]
    read = files_hashed(monkeypatch)
    monkeypatch.setattr(content_module, "_SETTLED_S", 3600.0)
    first = content_digest(paths)
    assert content_digest(paths) == first
    assert len(read) == 4  # files so young could have changed since
    monkeypatch.setattr(content_module, "_SETTLED_S", -1.0)
    assert [content_digest(paths) for _ in range(3)] == [first] * 3
    assert len(read) == 6
    os.utime(paths[0][1])
    assert content_digest(paths) == first
    assert len(read) == 8
    shutil.copyfile(paths[1][1], paths[0][1])
    assert content_digest(paths) != first


@pytest.fixture
def saved_tokenizer(corpus, tmp_path):
    tokenizer = prepare(data_of(corpus, store="first")).tokenizer
    tokenizer.save(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_tokenizer_is_known_by_its_content_not_its_path(corpus, saved_tokenizer, tmp_path):
    def at(path):
        return data_of(corpus, TokenizerConfig("wordpiece", path=str(path)), store="store")

    made = prepare(at(saved_tokenizer))
    shutil.copytree(saved_tokenizer, tmp_path / "copy")
    _touched(saved_tokenizer)
    paths = (saved_tokenizer, "saved", "~/saved", "copy/tokenizer.json", "copy/", "not/there")
    for opening in (prepare, open_dataset):
        assert {opening(at(path)).fingerprint for path in paths} == {made.fingerprint}


def test_the_tokenizer_that_a_store_trained_may_be_given_by_its_path(corpus, saved_tokenizer):
    given = TokenizerConfig("wordpiece", path=str(saved_tokenizer))
    made = open_dataset(data_of(corpus, store="first"))
    assert open_dataset(data_of(corpus, given, store="first")).fingerprint == made.fingerprint
    other = prepare(data_of(corpus, replace(WORDPIECE, vocab_size=61), store="other"))
    other.tokenizer.save(saved_tokenizer)
    with pytest.raises(UserError, match=f"but {saved_tokenizer} has"):
        open_dataset(data_of(corpus, given, store="first"))


def test_default_stores_of_two_tokenizers_at_one_path_are_two(corpus, saved_tokenizer):
    data = data_of(corpus, TokenizerConfig("wordpiece", path=str(saved_tokenizer)))
    first = prepare(data)
    prepare(data_of(corpus, replace(WORDPIECE, vocab_size=61), store="other")).tokenizer.save(
        saved_tokenizer
    )
    second = prepare(data)
    assert second.directory != first.directory
    assert second.tokenizer.fingerprint != first.tokenizer.fingerprint


@pytest.mark.parametrize("kind", ["text", "mixture"])
def test_a_store_prepared_again_for_a_run_gets_the_tokenizer_of_the_run(corpus, monkeypatch, kind):
    data = data_of(corpus, store="store")
    if kind == "mixture":
        data = mixed(corpus)
    made = prepare(data)
    shutil.rmtree("store")
    monkeypatch.delattr(store_tokenizer_module, "train_tokenizer")
    monkeypatch.setattr(prepare_module, "train_tokenizer", None)
    again = prepare(data, of_run={"tokenizer": made.tokenizer})
    assert again.fingerprint == made.fingerprint
    assert again.tokenizer.fingerprint == made.tokenizer.fingerprint
    with pytest.raises(UserError, match=r"no finished .*; run .*--data.tokenizer.path"):
        open_dataset(replace(data, store="none"), of_run={"tokenizer": made.tokenizer})


def test_a_run_does_not_share_the_default_store_of_another_tokenizer(corpus):
    mine = prepare(data_of(corpus, replace(WORDPIECE, vocab_size=61), store="mine"))
    others = prepare(data_of(corpus))  # the default store, whose tokenizer another run trained
    of_run = {"tokenizer": mine.tokenizer}
    again = prepare(data_of(corpus), of_run=of_run)
    assert again.directory == f"{others.directory}-{mine.tokenizer.fingerprint[:12]}"
    assert again.tokenizer.fingerprint == mine.tokenizer.fingerprint
    assert open_dataset(data_of(corpus), of_run=of_run).directory == again.directory
    assert open_dataset(data_of(corpus)).directory == others.directory


def test_the_components_of_a_mixture_may_move(corpus, tmp_path):
    made = prepare(mixed(corpus))
    made.tokenizer.save(tmp_path / "saved")
    moved = _touched(_moved(corpus))
    at = TokenizerConfig("wordpiece", path="saved")
    for opening in (prepare, open_dataset):
        assert opening(mixed(moved)).fingerprint == made.fingerprint
        assert opening(mixed(moved, at)).fingerprint == made.fingerprint
    shutil.rmtree(moved)
    assert prepare(mixed(moved)).fingerprint == made.fingerprint


def test_images_are_read_from_their_present_path(tmp_path):
    def at(path):
        return image_data(path, store="store")

    write_folder(tmp_path / "pets")
    made = prepare(at("pets"))
    expected = [image.tobytes() for _, image in read_all(made)]
    shutil.copytree("pets", "copy")
    os.rename("pets", "moved")
    for path in ("moved", "copy/", tmp_path / "moved", "~/copy"):
        for opening in (prepare, open_dataset):
            again = opening(at(path))
            assert again.fingerprint == made.fingerprint
            assert [image.tobytes() for _, image in read_all(again)] == expected
            assert len(read_all(again, "validation")) == 12
    with pytest.raises(UserError, match=r"nothing at pets; set data.source.path to their present"):
        open_dataset(at("pets"))


@pytest.mark.parametrize("gone", [True, False])
def test_images_that_a_store_holds_itself_may_move_or_go(tmp_path, gone):
    write_idx(tmp_path / "mnist")
    given = prepare(image_data("mnist", store="store"))
    default = prepare(image_data("mnist"))
    if gone:
        shutil.rmtree("mnist")
    else:
        os.rename("mnist", "moved")
    path = "mnist" if gone else _touched(tmp_path / "moved")
    for opening in (prepare, open_dataset):
        assert opening(image_data(path, store="store")).fingerprint == given.fingerprint
        assert opening(image_data(path)).directory == default.directory


def test_a_run_keeps_the_images_of_which_splits_in_upper_case_were_classes(tmp_path, monkeypatch):
    pets = write_folder(tmp_path / "pets", ("Training", "Testing"))
    data = image_data(pets, validation_fraction=0.3)
    with monkeypatch.context() as earlier:
        for module in (image_files, sources):
            earlier.setattr(
                module, "folders_by_name", lambda root: {x.name: x for x in root.iterdir()}
            )
        earlier.setattr(dataset, "_KNOWN", dataset._KNOWN_BEFORE)
        former = prepared_data(data)
    assert former.label_names == ("Testing", "Training")
    assert prepared_data(data).label_names == ("cat", "dog")
    assert prepared_data(data, {}, former.fingerprint).directory == former.directory
    monkeypatch.setattr(dataset, "_KNOWN", "unknown")
    shutil.rmtree(tmp_path / "pets")  # the store of an earlier version does without it
    assert data.preparation().folder.path == former.directory


def test_images_that_change_while_they_are_prepared_make_no_store(tmp_path, monkeypatch):
    write_folder(tmp_path / "pets")
    write = parts.write_parts

    def replaced(*arguments):
        write(*arguments)
        image = tmp_path / "pets/train/dog/1.png"
        image.write_bytes(image.read_bytes()[:-1] + b"!")

    monkeypatch.setattr(parts, "write_parts", replaced)
    with pytest.raises(UserError, match="pets changed while it was prepared"):
        prepare(image_data("pets", store="store"))
    assert not Path("store/manifest.json").exists()


def test_a_store_of_the_version_before_is_opened_and_keeps_its_name(corpus):
    """It noted paths, and a digest of modification times; a field may be newer than it."""
    data = data_of(corpus, store="store")
    made = prepare(data)
    path = Path("store/manifest.json")
    manifest = json.loads(path.read_text())
    settings = manifest["corpus"]["settings"]
    del settings["source"]["type"], settings["gates"]["drop_duplicates"]
    settings["source"]["path"] = "/data/corpus"
    settings["tokenizer"]["path"] = None
    manifest["corpus"] = {"settings": settings, "content": "of names, sizes and times"}
    path.write_bytes(sealed({key: v for key, v in manifest.items() if key != DIGEST}))
    for opening in (prepare, open_dataset):
        again = opening(data)
        assert again.fingerprint == made.fingerprint
        assert again.known_as != made.known_as  # what its checkpoints have noted
    with pytest.raises(UserError, match="made with shards=2; this run asks for shards=3"):
        prepare(replace(data, shards=3))


@pytest.fixture
def all_splits(tmp_path):
    """A corpus whose store is of a version that read the files of all splits; and that store."""
    root = tmp_path / "splits"
    root.mkdir()
    for split in ("train", "test"):
        lines = [f"{split} text {n}, which a model reads.\n\n" for n in range(20)]
        (root / f"{split}.txt").write_text("".join(lines))
    data = data_of(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "keep_split", lambda listing, *_, **__: listing)
        return data, prepare(data)


def test_a_new_run_does_not_train_on_files_of_other_splits(all_splits, caplog):
    data, earlier = all_splits
    new = prepare(data)
    assert new.directory != earlier.directory and not caplog.text
    assert new.train.num_documents < earlier.train.num_documents - 10


def test_a_run_on_a_store_of_all_splits_keeps_it(all_splits, caplog):
    data, earlier = all_splits
    of_run = {"tokenizer": earlier.tokenizer}
    for same in (data, replace(data, store=earlier.directory)):
        for compare in ("warning", "sizes", "content"):
            found = prepare(same, of_run=of_run, compare=compare)
            assert found.fingerprint == earlier.fingerprint
    assert "was made by an earlier version" in caplog.text
    assert "have changed since" not in caplog.text
    caplog.clear()
    (Path(data.source.path) / "train.txt").write_text("Another text.\n")
    with pytest.raises(UserError, match="have changed since"):
        prepare(replace(data, store=earlier.directory))


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "compiled_once")
def test_a_run_on_a_store_of_all_splits_goes_on_after_a_new_run(all_splits, tmp_path, capsys):
    data = replace(all_splits[0], tokenizer=TokenizerConfig("bytes"))
    config = replace(tiny_config("", "", steps=2), data=data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "keep_split", lambda listing, *_, **__: listing)
        earlier = prepare(data)
        ft.train(config, tmp_path / "run")
    assert prepare(data, of_run={"tokenizer": earlier.tokenizer}).fingerprint == earlier.fingerprint
    assert prepare(data).fingerprint != earlier.fingerprint
    longer = replace(config, phases=(replace(config.phases[0], steps=4),))
    assert ft.train(longer, tmp_path / "run").step == 4

    losses = [row["eval/loss"] for row in read_metrics(tmp_path / "run") if "eval/loss" in row]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["eval/loss"] == pytest.approx(losses[-1], rel=1e-5)


def test_the_stores_of_one_split_and_of_all_are_found_without_the_source(all_splits):
    data, earlier = all_splits
    new, of_run = prepare(data), {"tokenizer": earlier.tokenizer}
    assert new.tokenizer.fingerprint != earlier.tokenizer.fingerprint
    for _ in range(2):
        assert prepare(data, of_run=of_run).directory == earlier.directory
        assert prepare(data).directory == new.directory
        shutil.rmtree(data.source.path, ignore_errors=True)


def test_a_run_on_a_mixture_of_an_earlier_version_keeps_its_stores(all_splits):
    data, _ = all_splits
    folder = data.source.path
    mixture = MixedText(
        components=(Component(name="one", source=TextSource(folder)),),
        tokenizer=data.tokenizer, validation_fraction=0.2, shards=2, prepare_processes=1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "keep_split", lambda listing, *_, **__: listing)
        earlier = prepare(mixture)
    of_run = {"tokenizer": earlier.tokenizer}
    assert prepare(mixture, of_run=of_run).directory == earlier.directory
    assert prepare(mixture).directory != earlier.directory
