"""What a run of a mixture says of its parts."""

import dataclasses

import pytest

from flax_transformers.data.dataset import prepare
from flax_transformers.data.mixture import Component, MixedText
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.monitoring.mixture_progress import MixtureProgress
from flax_transformers.testing import tiny_config, write_corpus
from flax_transformers.training.config import Phase
from tests.evaluation.test_held_out import LENGTH, Shares, by_hand, score


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    for name, documents in (("de", 6), ("en", 11)):
        write_corpus(folder / f"{name}.txt", documents)
        write_corpus(folder / f"{name}_held_out.txt", documents // 2)
    return prepare(
        MixedText(
            components=tuple(
                Component(
                    name=name,
                    source=TextSource(f"{folder}/{name}.txt"),
                    validation_source=TextSource(f"{folder}/{name}_held_out.txt"),
                    weight=weight,
                )
                for name, weight in (("de", 1.0), ("en", 3.0))
            ),
            tokenizer=TokenizerConfig("bytes"),
            store=f"{folder}/store",
            shards=1,
        )
    )


def test_each_part_is_scored_by_itself_and_all_together(prepared):
    found, _ = score(prepared, batch_size=4)
    shares = {
        name: by_hand(part) for name, part in zip(prepared.names, prepared.parts, strict=True)
    }
    for name, (share, _) in shares.items():
        assert found[f"eval/e_{name}"] == pytest.approx(share, rel=1e-6)
    tokens = [part.validation.num_tokens for part in prepared.parts]
    whole = sum(n * share for n, (share, _) in zip(tokens, shares.values(), strict=True))
    assert found["eval/e"] == pytest.approx(whole / sum(tokens), rel=1e-6)


def test_the_examples_of_a_mixture_are_opened_once_for_all_phases(prepared, monkeypatch):
    phases = tuple(Phase(10, length, 8) for length in (LENGTH, 2 * LENGTH, LENGTH))
    opened, examples, part = [], PreparedText.examples, dataclasses.replace(prepared)
    monkeypatch.setattr(
        PreparedText, "examples", lambda *given: opened.append(given) or examples(*given)
    )
    for phase in range(3):
        MixtureProgress(Shares(), phases, part, phase)
    assert len(opened) == 2 * len(prepared.parts)
    assert part.examples("validation", Shares().window_spec(LENGTH)) is not None


def test_what_was_taken_of_each_part_adds_up_over_phases(prepared):
    phases = (Phase(10, LENGTH, 8), Phase(5, 2 * LENGTH, 4))
    config = tiny_config("text.txt", "store", objective=Shares(), phases=phases)
    row = MixtureProgress(config.objective, config.phases, prepared, phase=1).row(20)
    assert (row["train/examples_de"], row["train/examples_en"]) == (25, 75)
    sizes = [
        len(prepared.parts[0].examples("train", Shares().window_spec(phase.sequence_length)))
        for phase in phases
    ]
    epochs = 20 / sizes[0] + 5 / sizes[1]
    assert row["train/epochs_de"] == pytest.approx(epochs)
    assert row["train/tokens_de"] == pytest.approx(epochs * prepared.parts[0].train.num_tokens)
    alone = dataclasses.replace(config, data=prepared.data.part(prepared.data.components[0]))
    assert MixtureProgress(alone.objective, alone.phases, prepared.parts[0], phase=1).row(20) == {}
