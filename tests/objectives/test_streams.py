"""The rows of every objective of text come out the same however the work is shared out."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.pipeline.loader import TrainStream
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.denoising import Denoising
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.mixture_of_denoisers import MixtureOfDenoisers
from flax_transformers.objectives.next_sentence import NextSentence, SentenceOrder
from flax_transformers.objectives.prefix_lm import PrefixLM
from flax_transformers.objectives.replaced_tokens import ReplacedTokenDetection
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.objectives.span_corruption import SpanCorruption
from tests.data.prepare.test_text import write_corpus

LENGTH, BATCH = 64, 4
OBJECTIVES = {
    "token masks": MaskedLM(),
    "span masks": MaskedLM(choose="span"),
    "static masks": MaskedLM(static_epochs=2),
    "next sentence": NextSentence(),
    "sentence order": SentenceOrder(),
    "replaced tokens": ReplacedTokenDetection(),
    "causal": CausalLM(),
    "prefix": PrefixLM(),
    "span corruption": SpanCorruption(),
    "denoising": Denoising(),
    "denoisers": MixtureOfDenoisers(),
    "pairs": SequenceToSequence(),
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    texts = write_corpus(folder / "text.jsonl", documents=30)
    rows = [{"source": text, "target": text.upper()} for text in texts]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {
        "text": TextSource(f"{folder}/text.jsonl"),
        "pairs": PairSource(f"{folder}/pairs.jsonl"),
    }
    tokenizer = TokenizerConfig("bytes")
    return {
        name: prepare(
            TextData(source=source, tokenizer=tokenizer, validation_fraction=0.0, shards=1),
            folder / name,
        )
        for name, source in sources.items()
    }


def batches(prepared, objective, count, **settings):
    spec = objective.window_spec(LENGTH)
    with TrainStream(
        prepared.examples("train", spec),
        objective,
        prepared.vocabulary,
        sequence_length=LENGTH,
        batch_size=BATCH,
        seed=3,
        static_epochs=spec.static_epochs,
        **settings,
    ) as stream:
        return [next(stream) for _ in range(count)]


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def over_hosts(hosts, prepared, objective, count, **settings):
    share = BATCH // hosts
    each = [
        batches(prepared, objective, count, rows=range(i * share, (i + 1) * share), **settings)
        for i in range(hosts)
    ]
    return [joined(parts) for parts in zip(*each, strict=True)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_examples_do_not_depend_on_hosts_or_a_resume(name, stores):
    objective = OBJECTIVES[name]
    prepared = stores["pairs" if name == "pairs" else "text"]
    expected = joined(batches(prepared, objective, 12))
    found = [
        *over_hosts(2, prepared, objective, 5),
        *over_hosts(4, prepared, objective, 4, position=5 * BATCH),
        *over_hosts(1, prepared, objective, 3, position=9 * BATCH),
    ]
    for array, values in joined(found).items():
        np.testing.assert_array_equal(values, expected[array], err_msg=array)


@dataclass(frozen=True)
class Digests:
    """One row of each of several objectives from the same text, as a digest."""

    objectives: tuple

    def window_spec(self, sequence_length):
        return NextSentence().window_spec(sequence_length)  # what it reads is enough for all

    def prepare(self, example, rng, vocab, sequence_length):
        digest = hashlib.sha256()
        for objective in self.objectives:
            row = objective.prepare(example, rng, vocab, sequence_length)
            for name in sorted(row):
                digest.update(name.encode() + row[name].tobytes())
        return {"digest": np.frombuffer(digest.digest(), np.uint8)}


@pytest.mark.multi_process
def test_examples_do_not_depend_on_workers(stores):
    objective = Digests(tuple(OBJECTIVES[name] for name in OBJECTIVES if name != "pairs"))
    expected = joined(batches(stores["text"], objective, 8))
    found = joined(batches(stores["text"], objective, 8, workers=1))
    assert len(np.unique(expected["digest"], axis=0)) > 20
    np.testing.assert_array_equal(found["digest"], expected["digest"])
