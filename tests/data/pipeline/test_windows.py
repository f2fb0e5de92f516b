import copy
from itertools import chain

import numpy as np
import pytest

from flax_transformers.data.pipeline import windows as windows_module
from flax_transformers.data.pipeline.text_examples import TextExamples
from flax_transformers.data.pipeline.windows import cached_window_index, window_index
from flax_transformers.data.store.files import StoreArray
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import WindowSpec
from flax_transformers.storage import folders


def corpus(*documents):
    """Documents given as sentence lengths; ids do not matter here."""
    return [[[1] * length for length in document] for document in documents]


def spans(windows):
    windows = windows.read(0, len(windows)) if isinstance(windows, StoreArray) else windows
    return [(int(start), int(start + length)) for start, length in windows]


def random_corpus(rng, documents=60, longest=40):
    return corpus(
        *(rng.integers(1, longest, rng.integers(1, 9)).tolist() for _ in range(documents))
    )


def greedy(store, spec):
    """The definition, followed literally: grow the window a sentence at a time while it fits."""
    sentences, documents = store.sentence_ends.tolist(), store.document_ends.tolist()
    found, start = [], 0
    while start < store.num_tokens:
        stop = min(start + spec.length, next(end for end in sentences if end > start))
        more = [end for end in sentences if end > stop]
        for end in more if spec.sentences is None else more[: spec.sentences - 1]:
            inside = sum(start < document < end for document in documents)
            if (inside and not spec.cross_documents) or end - start + inside > spec.length:
                break
            stop = end
        found.append((start, stop))
        start = stop
    return found


@pytest.mark.parametrize("sentences", [None, 1, 2, 5])
@pytest.mark.parametrize("cross_documents", [True, False])
@pytest.mark.parametrize("length", [39, 100, 100_000])
def test_windows_have_no_more_sentences_than_asked_for(
    make_store, length, cross_documents, sentences
):
    rng = np.random.default_rng(length)
    store = make_store(random_corpus(rng), random_corpus(rng))
    spec = WindowSpec(length, cross_documents, sentences=sentences)
    assert spans(window_index(store, spec)) == greedy(store, spec)


@pytest.mark.slow
@pytest.mark.parametrize("cross_documents", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 39, 100, 100_000])
def test_windows_are_those_of_the_literal_definition(make_store, length, cross_documents):
    rng = np.random.default_rng(length)
    store = make_store(random_corpus(rng), random_corpus(rng))
    spec = WindowSpec(length, cross_documents)
    assert spans(window_index(store, spec)) == greedy(store, spec)


def filled(store, spec):
    """Every so many places of the text, a separator behind each document being one."""
    documents, start = [], 0
    for end in store.document_ends.tolist():
        documents.append([*range(start, end), None])
        start = end
    texts = [list(chain(*documents))] if spec.cross_documents else documents
    pieces = [text[i : i + spec.length] for text in texts for i in range(0, len(text), spec.length)]
    tokens = [[token for token in piece if token is not None] for piece in pieces]
    return [(piece[0], piece[-1] + 1) for piece in tokens if piece]


@pytest.mark.parametrize("cross_documents", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 39, 100, 100_000])
def test_windows_that_need_no_whole_sentences_are_full(make_store, length, cross_documents):
    rng = np.random.default_rng(length)
    store = make_store(random_corpus(rng), random_corpus(rng, longest=3))
    spec = WindowSpec(length, cross_documents, whole_sentences=False)
    assert spans(window_index(store, spec)) == filled(store, spec)


@pytest.mark.parametrize("cross_documents", [True, False])
@pytest.mark.parametrize("whole_sentences", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 100])
def test_windows_do_not_depend_on_the_shards_and_blocks_that_are_read(
    make_store, monkeypatch, tmp_path, length, whole_sentences, cross_documents
):
    parts = [random_corpus(np.random.default_rng(i), 20 if i % 3 else 1, 9) for i in range(6)]
    spec = WindowSpec(length, cross_documents, whole_sentences=whole_sentences)
    expected = spans(window_index(make_store(list(chain(*parts))), spec))
    monkeypatch.setattr(windows_module, "_ENDS_AT_ONCE", 5)
    store = make_store([], *parts, [], directory=tmp_path / "shards")
    # Of the store, no more than the ends that a block needs are read at once.
    monkeypatch.setattr(TokenStore, "_global_ends", None)
    assert spans(cached_window_index(store, spec)) == expected
    assert spans(window_index(store, spec)) == expected


@pytest.mark.parametrize("cross_documents", [True, False])
@pytest.mark.parametrize("length", [1, 5, 33, 128])
def test_every_token_is_in_exactly_one_window(make_store, length, cross_documents):
    store = make_store(random_corpus(np.random.default_rng(0)))
    windows = window_index(store, WindowSpec(length, cross_documents))
    times = np.zeros(store.num_tokens, int)
    for start, stop in spans(windows):
        times[start:stop] += 1
    assert (times == 1).all()


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 5, 33, 128])
def test_tokens_and_separators_never_exceed_the_length(make_store, length):
    store = make_store(random_corpus(np.random.default_rng(1), documents=300, longest=4))
    for start, stop in spans(window_index(store, WindowSpec(length, True))):
        separators = sum(start < end < stop for end in store.document_ends)
        assert stop - start + separators <= length


def test_a_document_end_inside_a_window_counts_as_a_token(make_store):
    store = make_store(corpus([3], [3], [1]))
    assert spans(window_index(store, WindowSpec(7, True))) == [(0, 6), (6, 7)]
    assert spans(window_index(store, WindowSpec(6, True))) == [(0, 3), (3, 7)]


def test_a_document_end_at_the_end_of_a_window_costs_nothing(make_store):
    store = make_store(corpus([4], [4]))
    assert spans(window_index(store, WindowSpec(4, True))) == [(0, 4), (4, 8)]


def test_a_document_end_at_the_start_of_a_window_costs_nothing(make_store):
    store = make_store(corpus([5], [2, 3]))
    assert spans(window_index(store, WindowSpec(5, True))) == [(0, 5), (5, 10)]


def test_windows_within_documents_stop_at_every_document_end(make_store):
    store = make_store(corpus([1, 1], [1], [2]))
    assert spans(window_index(store, WindowSpec(100, False))) == [(0, 2), (2, 3), (3, 5)]


def test_a_sentence_longer_than_a_window_is_split_and_its_rest_shares_a_window(make_store):
    store = make_store(corpus([2, 11, 1, 5]))
    # 2 | 4 4 3+1 | 4 1
    expected = [(0, 2), (2, 6), (6, 10), (10, 14), (14, 18), (18, 19)]
    assert spans(window_index(store, WindowSpec(4, False))) == expected


@pytest.mark.parametrize("cross_documents", [True, False])
@pytest.mark.parametrize("length", [3, 16, 50])
def test_working_in_blocks_changes_nothing(make_store, monkeypatch, length, cross_documents):
    store = make_store(random_corpus(np.random.default_rng(2)))
    spec = WindowSpec(length, cross_documents)
    at_once = window_index(store, spec)
    monkeypatch.setattr(windows_module, "_ENDS_AT_ONCE", 1)
    np.testing.assert_array_equal(window_index(store, spec), at_once)


def test_starts_and_lengths_have_the_documented_types(make_store):
    windows = window_index(make_store(corpus([3])), WindowSpec(4, True))
    assert windows.dtype == np.dtype([("start", "<i8"), ("length", "<i4")])


def test_a_corpus_smaller_than_a_window_has_one_window(make_store):
    assert spans(window_index(make_store(corpus([3])), WindowSpec(512, True))) == [(0, 3)]


def test_a_split_without_tokens_is_refused(make_store):
    empty = TokenStore(make_store(corpus([3])).directory, "validation")
    with pytest.raises(UserError, match=r"validation split .* has no tokens"):
        window_index(empty, WindowSpec(4, True))


def test_a_length_without_space_for_text_is_refused(make_store):
    with pytest.raises(UserError, match="Windows of 0 tokens"):
        window_index(make_store(corpus([3])), WindowSpec(0, True))


def test_the_cached_index_is_read_from_the_store_and_equal(make_store, monkeypatch):
    store = make_store(random_corpus(np.random.default_rng(3)))
    for cross_documents in (True, False):
        spec = WindowSpec(20, cross_documents)
        expected = window_index(store, spec)
        assert isinstance(cached_window_index(store, spec), StoreArray)
        with monkeypatch.context() as patch:  # the second time it is not computed
            patch.delattr(windows_module, "window_index")
            kept = cached_window_index(store, spec)
            np.testing.assert_array_equal(kept.read(0, len(kept)), expected)


def test_an_index_of_another_store_in_the_same_place_is_not_used(make_store):
    spec = WindowSpec(4, True)
    first = cached_window_index(make_store(corpus([3, 3])), spec)
    second = cached_window_index(make_store(corpus([2, 4])), spec)
    assert spans(first) == [(0, 3), (3, 6)]
    assert spans(second) == [(0, 2), (2, 6)]


def test_a_cached_index_with_any_flipped_bit_is_rebuilt(make_store, tmp_path):
    store, spec = make_store(corpus([3, 3])), WindowSpec(4, True)
    cached_window_index(store, spec)
    (path,) = (tmp_path / "store/windows").iterdir()
    whole = path.read_bytes()
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(bytes(damaged))
        assert spans(cached_window_index(store, spec)) == [(0, 3), (3, 6)]
    path.write_bytes(whole[:-5])
    assert spans(cached_window_index(store, spec)) == [(0, 3), (3, 6)]


def test_a_kept_index_is_checked_in_blocks_and_not_in_the_processes_that_share_it(
    make_store, monkeypatch
):
    store, spec = make_store(random_corpus(np.random.default_rng(3))), WindowSpec(20, True)
    examples, read, asked = TextExamples(store, spec), StoreArray.read, []
    expected = window_index(store, spec)
    monkeypatch.setattr(windows_module, "_CHECKED", 7)
    monkeypatch.setattr(StoreArray, "read", lambda self, *a: asked.append(a) or read(self, *a))
    kept = cached_window_index(store, spec)
    assert [stop - start for start, stop in asked][:-1] == [7] * (len(kept) // 7)
    asked.clear()
    shared = copy.deepcopy(examples)
    assert asked == []
    np.testing.assert_array_equal(shared._windows.read(0, len(shared)), expected)


def test_an_index_that_is_gone_is_rebuilt_by_the_process_that_would_share_it(make_store, tmp_path):
    examples = TextExamples(make_store(corpus([3, 3])), WindowSpec(4, True))
    state = examples.__getstate__()
    (path,) = (tmp_path / "store/windows").iterdir()
    path.unlink()
    shared = TextExamples.__new__(TextExamples)
    shared.__setstate__(state)
    assert spans(shared._windows) == [(0, 3), (3, 6)]


def test_a_process_that_builds_the_index_later_does_not_replace_what_others_read(
    make_store, monkeypatch
):
    store, spec = make_store(corpus([3, 3])), WindowSpec(4, True)
    blocks, found = windows_module._blocks, []

    def slow(store, spec):
        monkeypatch.setattr(windows_module, "_blocks", blocks)
        with monkeypatch.context() as patch:  # another process is faster
            patch.setattr(folders.os, "getpid", lambda: 1)
            found.append(cached_window_index(store, spec))
        yield from blocks(store, spec)

    monkeypatch.setattr(windows_module, "_blocks", slow)
    found.append(cached_window_index(store, spec))
    monkeypatch.setattr(folders, "_OPEN_FILES", 1)
    folders.LocalFolder(store.directory).open("manifest.json")  # closes the others
    for index in 2 * found:  # each is opened again
        assert spans(index) == [(0, 3), (3, 6)]


def test_where_the_index_cannot_be_cached_it_stays_in_memory(make_store, tmp_path):
    store, spec = make_store(corpus([3, 3])), WindowSpec(4, True)
    (tmp_path / "store/windows").write_text("in the way")
    windows = cached_window_index(store, spec)
    assert spans(windows) == [(0, 3), (3, 6)]
    assert isinstance(windows, np.ndarray)
    bucket = TokenStore(f"file://{store.directory}")
    assert spans(cached_window_index(bucket, spec)) == [(0, 3), (3, 6)]
