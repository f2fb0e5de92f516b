import copy
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from flax_transformers.data.pipeline.examples import Examples
from flax_transformers.data.pipeline.loader import TrainStream, ordered_batches
from flax_transformers.data.pipeline.text_examples import TextExamples
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.errors import UserError
from flax_transformers.objectives.base import Vocabulary, WindowSpec
from flax_transformers.objectives.causal_lm import CausalLM

VOCAB = Vocabulary(size=1000, pad_id=0)


@dataclass(frozen=True)
class RandomTags:
    """Pads the tokens and draws one random number for each place, as a mask would."""

    def prepare(self, example, rng, vocab, sequence_length):
        row = np.full(sequence_length, vocab.pad_id, np.int32)
        row[: len(example["tokens"])] = example["tokens"]
        return {"tokens": row, "tags": rng.integers(1, 1 << 30, sequence_length, np.int32)}


@dataclass(frozen=True)
class Failing:
    def prepare(self, example, rng, vocab, sequence_length):
        raise UserError("this row cannot be used; fix it")


@dataclass(frozen=True)
class Numbers(Examples):
    """Example i is the token i + 1."""

    count: int
    read_threads: int = 0

    def __len__(self):
        return self.count

    def read(self, index, rng):
        return {"tokens": np.array([index + 1], np.int32), "document_ends": np.zeros(0, np.int32)}


def stream(examples=None, objective=None, **settings):
    chosen = {"sequence_length": 4, "batch_size": 4, "seed": 7, **settings}
    return TrainStream(
        Numbers(10) if examples is None else examples, objective or RandomTags(), VOCAB, **chosen
    )


def take(stream, batches):
    with stream:
        return [next(stream) for _ in range(batches)]


def joined(parts):
    """Batches, or hosts, one after the other as one dict of arrays."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        assert one[name].dtype == other[name].dtype


def share(host, hosts, batch_size):
    """The rows of one host where hosts hold equal, contiguous shares."""
    rows = batch_size // hosts
    return range(host * rows, (host + 1) * rows)


def over_hosts(hosts, batches, **settings):
    """The global batches, put together from what each host reads."""
    each = [
        take(stream(rows=share(h, hosts, settings.get("batch_size", 4)), **settings), batches)
        for h in range(hosts)
    ]
    return joined([joined(parts) for parts in zip(*each, strict=True)])


def evaluate(count, batch_size, hosts=1, seed=7):
    return [
        list(
            ordered_batches(
                Numbers(count),
                RandomTags(),
                VOCAB,
                sequence_length=4,
                batch_size=batch_size,
                seed=seed,
                rows=share(host, hosts, batch_size),
            )
        )
        for host in range(hosts)
    ]


def test_the_global_stream_is_identical_for_any_number_of_hosts():
    expected = over_hosts(1, 9)
    for hosts in (2, 4):
        assert_equal(over_hosts(hosts, 9), expected)


@pytest.mark.full
@pytest.mark.multi_process
def test_the_global_stream_is_identical_for_any_number_of_workers():
    """By default shown where workers change, below."""
    expected = over_hosts(1, 9)
    for hosts in (1, 2):
        assert_equal(over_hosts(hosts, 9, workers=2), expected)


@pytest.mark.multi_process
def test_the_stream_resumes_exactly_when_hosts_and_workers_change_mid_epoch():
    expected = over_hosts(1, 9)  # 36 examples; an epoch has 10
    parts = [
        over_hosts(1, 2, workers=2),
        over_hosts(4, 1, position=8),
        over_hosts(2, 3, position=12),
        over_hosts(1, 3, position=24),
    ]
    assert_equal(joined(parts), expected)


def test_the_stream_resumes_exactly_when_the_batch_size_changes():
    expected = over_hosts(1, 6)
    parts = [over_hosts(1, 1), over_hosts(2, 2, position=4, batch_size=6)]
    parts.append(over_hosts(1, 1, position=16, batch_size=8))
    assert_equal(joined(parts), expected)


def test_each_example_comes_exactly_once_an_epoch():
    ids = over_hosts(2, 25, batch_size=4)["example_id"].reshape(10, 10)
    for epoch in ids:
        assert sorted(epoch) == list(range(10))


@pytest.mark.slow
def test_each_epoch_has_an_order_of_its_own():
    ids = over_hosts(1, 25, batch_size=4)["example_id"].reshape(10, 10)
    assert len({tuple(epoch) for epoch in ids}) == 10


def test_an_example_is_prepared_anew_each_epoch_from_the_same_tokens():
    batches = over_hosts(1, 10, batch_size=10)
    for number in range(10):
        rows = batches["example_id"] == number
        assert (batches["tokens"][rows, 0] == number + 1).all()
        assert len(np.unique(batches["tags"][rows], axis=0)) == 10


def test_no_two_rows_of_the_stream_share_random_numbers():
    tags = over_hosts(4, 25)["tags"]
    assert len(np.unique(tags)) == tags.size


@pytest.mark.parametrize("seed", [8, (7,), (7, 0), (7, 1), (7, "short")])
def test_another_seed_gives_another_order_and_other_random_numbers(seed):
    one, other = over_hosts(1, 5), over_hosts(1, 5, seed=seed)
    if seed == (7,):  # a seed alone and in a tuple are the same
        assert_equal(one, other)
    else:
        assert (one["example_id"] != other["example_id"]).any()
        assert not set(one["tags"].ravel()) & set(other["tags"].ravel())


def test_neighbouring_seeds_are_not_each_other_one_epoch_on():
    epochs = over_hosts(1, 10, batch_size=10)["example_id"].reshape(10, 10)
    neighbour = over_hosts(1, 10, batch_size=10, seed=8)["example_id"].reshape(10, 10)
    assert not {tuple(epoch) for epoch in epochs} & {tuple(epoch) for epoch in neighbour}


def test_position_counts_examples_of_all_hosts():
    with stream(rows=[2, 3], position=8) as one:
        next(one)
        assert one.position == 12


@pytest.mark.multi_process
@pytest.mark.parametrize("workers", [0, 1])
def test_setting_the_position_goes_there(workers):
    with stream(workers=workers) as one:
        batches = [next(one) for _ in range(4)]
        one.position = 4
        assert_equal(next(one), batches[1])
        assert one.position == 8


def test_a_closed_stream_can_be_read_on():
    with stream() as one:
        first = next(one)
        one.close()
        assert_equal(joined([first, next(one)]), over_hosts(1, 2))


class Threaded(Numbers):
    """Numbers that note which threads read them."""

    readers: ClassVar[set[int]] = set()

    def read(self, index, rng):
        self.readers.add(threading.get_ident())
        return super().read(index, rng)


def test_threads_read_where_examples_ask_for_them_and_change_nothing():
    Threaded.readers.clear()
    threaded = take(stream(Threaded(10, read_threads=3)), 9)
    assert_equal(joined(threaded), over_hosts(1, 9))
    assert threading.get_ident() not in Threaded.readers
    assert 1 <= len(Threaded.readers) <= 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_batch_larger_than_the_corpus_holds_several_epochs(count):
    (batch,) = take(stream(Numbers(count), batch_size=4 * count), 1)
    for epoch in batch["example_id"].reshape(4, count):
        assert sorted(epoch) == list(range(count))


def test_shuffling_a_hundred_million_examples_needs_no_table():
    ids = joined(take(stream(Numbers(100_000_000), position=99_999_996), 2))["example_id"]
    assert len(set(ids)) == 8
    assert ids.max() > 1_000_000


def test_each_epoch_of_many_examples_has_an_order_of_its_own_and_each_example_once():
    count = 2000  # from 1,025 on there is no table
    orders = [np.arange(count)]
    for epoch, key in ((0, 1), (1, 1), (0, 2)):
        positions = range(epoch * count, (epoch + 1) * count)
        epochs, numbers = np.transpose([Numbers(count).locate(one, key) for one in positions])
        assert set(epochs.tolist()) == {epoch}
        assert sorted(numbers) == list(range(count))
        assert all((numbers == other).sum() < 20 for other in orders)
        orders.append(numbers)


@pytest.mark.multi_process
@pytest.mark.parametrize("workers", [0, 1])
def test_what_prepare_raises_reaches_the_caller(workers):
    with pytest.raises(UserError, match="this row cannot be used"):
        take(stream(objective=Failing(), workers=workers), 1)


@pytest.mark.multi_process
def test_a_worker_that_is_killed_is_a_mistake_with_a_remedy():
    with stream(workers=1) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(UserError, match=r"exit code -9; give the job more memory.*shm-size"):
            take(batches, 9)  # some were ready


def test_hosts_may_hold_rows_that_are_not_neighbours():
    whole, some = take(stream(), 1)[0], take(stream(rows=[0, 3]), 1)[0]
    for name in whole:
        np.testing.assert_array_equal(some[name], whole[name][[0, 3]])


def test_rows_that_a_batch_does_not_have_are_refused():
    with pytest.raises(UserError, match=r"a batch of 6 rows has no rows \[5, 6\]"):
        stream(batch_size=6, rows=[5, 6])


def test_no_examples_are_refused():
    with pytest.raises(UserError, match="no training examples"):
        stream(Numbers(0))


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 21])
def test_evaluation_gives_each_example_once_over_all_hosts(count, hosts):
    each = evaluate(count, 8, hosts)
    assert [len(batches) for batches in each] == [-(-count // 8)] * hosts
    together = joined([joined(parts) for parts in zip(*each, strict=True)])
    assert together["example_id"].tolist() == [*range(count), *[-1] * (-count % 8)]
    assert together["tokens"][:count, 0].tolist() == list(range(1, count + 1))
    alone = joined(evaluate(count, 8)[0])
    assert_equal(together, alone)


def test_rows_that_fill_up_the_last_evaluation_batch_are_zeros():
    batches = joined(evaluate(5, 4)[0])
    filler = batches["example_id"] == -1
    assert filler.tolist() == [False] * 5 + [True] * 3
    assert not batches["tokens"][filler].any()
    assert not batches["tags"][filler].any()
    assert batches["tags"][~filler].all()


def test_evaluation_draws_the_same_random_numbers_at_any_batch_size():
    small, large = joined(evaluate(6, 2)[0]), joined(evaluate(6, 3)[0])
    assert_equal(small, large)
    assert len(np.unique(small["tags"])) == small["tags"].size  # those of each example are others


def test_evaluation_shares_no_random_numbers_with_training():
    training = over_hosts(1, 25)["tags"]
    evaluation = joined(evaluate(10, 5)[0])["tags"]
    assert not set(training.ravel()) & set(evaluation.ravel())


def test_evaluation_of_nothing_has_no_batches():
    assert evaluate(0, 4) == [[]]


DOCUMENTS = [[[1, 2], [3, 4]], [[5]], [[6, 7, 8]]]
RNG = np.random.default_rng(0)


def test_text_examples_are_windows_with_their_document_ends(make_store):
    examples = TextExamples(make_store(DOCUMENTS), WindowSpec(6, True))
    assert len(examples) == 2
    found = [examples.read(i, RNG) for i in range(2)]
    assert [{name: array.tolist() for name, array in example.items()} for example in found] == [
        {"tokens": [1, 2, 3, 4, 5], "document_ends": [4, 5], "sentence_ends": [2, 4, 5]},
        {"tokens": [6, 7, 8], "document_ends": [3], "sentence_ends": [3]},
    ]
    assert {array.dtype for array in found[0].values()} == {np.dtype(np.int32)}


def test_sentence_ends_are_read_only_for_objectives_that_need_them(make_store):
    store = make_store(DOCUMENTS)
    examples = TextExamples(store, CausalLM().window_spec(7))
    Path(store.directory, "train/00000.sentences").unlink()
    assert set(examples.read(0, RNG)) == {"tokens", "document_ends"}
    with pytest.raises(UserError, match="sentences"):
        TextExamples(store, WindowSpec(6, False, whole_sentences=False)).read(0, RNG)


def test_the_other_window_is_of_another_document_and_any_such_window_comes(make_store):
    store = make_store(DOCUMENTS, DOCUMENTS)
    examples = TextExamples(store, WindowSpec(2, False, other=True))
    windows = [examples.read(i, RNG)["tokens"].tolist() for i in range(len(examples))]
    assert windows[:3] == [[1, 2], [3, 4], [5]]
    others = [examples.read(1, RNG) for _ in range(200)]
    found = {tuple(other["other_tokens"].tolist()) for other in others}
    assert found == {(5,), (6, 7), (8,), (1, 2), (3, 4)}  # the last two from the second shard
    # A cut inside a sentence is not the end of one.
    ends = {tuple(other["other_sentence_ends"].tolist()) for other in others}
    assert ends == {(), (1,), (2,)}


def test_a_pair_needs_two_documents(make_store):
    with pytest.raises(UserError, match="has one document, but the objective needs pairs"):
        TextExamples(make_store([[[1, 2]]]), WindowSpec(2, False, other=True))


def test_static_epochs_repeat_the_same_random_numbers():
    batches = take(stream(Numbers(4), static_epochs=2), 6)  # a batch is an epoch
    epochs = [batch["tags"][np.argsort(batch["example_id"])] for batch in batches]
    same = [[np.array_equal(a, b) for b in epochs] for a in epochs]
    assert same == [[(i - k) % 2 == 0 for k in range(6)] for i in range(6)]
    assert len({row.tobytes() for row in np.concatenate(epochs[:2])}) == 8


@pytest.mark.multi_process
def test_workers_read_the_store_as_the_training_process_does(make_store):
    store = make_store(DOCUMENTS * 5, DOCUMENTS * 3)
    for directory in (store.directory, f"file://{store.directory}"):
        examples = TextExamples(TokenStore(directory), WindowSpec(4, True))
        alone = joined(take(stream(examples), 6))
        assert_equal(joined(take(stream(examples, workers=1), 6)), alone)


def test_text_examples_are_pickled_without_a_window_index_on_disk(make_store):
    store = make_store([[[1]] * 50] * 100)
    examples = TextExamples(store, WindowSpec(1, False))
    examples.read(0, RNG)
    assert len(ForkingPickler.dumps(examples)) < 4000
    assert copy.deepcopy(examples).read(4999, RNG)["tokens"].tolist() == [1]


def test_a_bucket_is_read_by_threads_and_a_disk_is_not(make_store):
    store, spec = make_store(DOCUMENTS), WindowSpec(4, True)
    assert TextExamples(store, spec).read_threads == 0
    assert TextExamples(TokenStore(f"file://{store.directory}"), spec).read_threads > 0


def test_a_corpus_smaller_than_one_window_is_refused_with_both_counts(make_store):
    store = make_store(DOCUMENTS)  # 8 tokens and 2 separators
    assert len(TextExamples(store, WindowSpec(10, True))) == 1
    with pytest.raises(UserError, match="8 tokens in 3 documents, one training window needs 11"):
        TextExamples(store, WindowSpec(11, True))


def test_short_documents_are_fine_where_windows_stay_within_them(make_store):
    assert len(TextExamples(make_store(DOCUMENTS), WindowSpec(512, False))) == 3


def test_a_validation_split_smaller_than_one_window_is_fine(make_store):
    store = make_store(DOCUMENTS, split="validation")
    assert len(TextExamples(store, WindowSpec(512, True))) == 1


KILLED_WHILE_TRAINING = """
import multiprocessing, os, pathlib, signal, sys
sys.path.insert(0, sys.argv[1])
import test_loader

if __name__ == "__main__":
    stream = test_loader.stream(workers=2)
    next(stream)
    pids = [str(child.pid) for child in multiprocessing.active_children()]
    pathlib.Path(sys.argv[2]).write_text(" ".join(pids))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


@pytest.mark.multi_process
def test_workers_end_when_the_training_process_is_killed(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED_WHILE_TRAINING)
    pids = tmp_path / "pids"
    killed = subprocess.run(
        [sys.executable, script, Path(__file__).parent, pids],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    workers = [int(pid) for pid in pids.read_text().split()]
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = [pid for pid in workers if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
