"""Tagged sentences: which lines are words, and that words keep their tags when tokenized."""

from __future__ import annotations

import numpy as np
import pytest

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sources import read as sources
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.documents import Counts
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.errors import UserError
from flax_transformers.objectives.token_classification import TokenClassification

CONLLU = """\
# sent_id = 1
# text = I can't.
1\tI\tI\tPRON\tPRP
2-3\tcan't\t_\t_\t_
2\tca\tcan\tAUX\tMD
2.1\tgone\tgo\tVERB\tVB
3\tn't\tnot\tPART\tRB
4\t.\t.\tPUNCT\t.

# sent_id = 2
1\t#\t#\tSYM\t#
2\t20 000\t20 000\tNUM\tCD
"""
SENTENCES = [
    [("I", "PRON"), ("ca", "AUX"), ("n't", "PART"), (".", "PUNCT")],
    [("#", "SYM"), ("20 000", "NUM")],
]


def read(path, **settings):
    counts = Counts()
    source = TaggedSource(str(path), **settings)
    documents = [document for _, document in sources.read_documents(source, counts=counts)]
    sentences = [
        list(zip((word.strip() for word in d.text), d.labels, strict=True)) for d in documents
    ]
    return sentences, counts


def test_words_are_those_that_universal_dependencies_counts(tmp_path):
    (tmp_path / "a.conllu").write_text(CONLLU)
    assert read(tmp_path / "a.conllu")[0] == SENTENCES
    other = read(tmp_path / "a.conllu", tag_column=-1)[0]
    assert [tag for _, tag in other[0]] == ["PRP", "MD", "RB", "."]


def test_columns_are_divided_by_blanks_where_there_is_no_tab(tmp_path):
    (tmp_path / "a.txt").write_text("-DOCSTART- -X- O O\n\n# SYM B-NP O\nEU NNP B-NP B-ORG\n\n\n")
    found = read(tmp_path / "a.txt", word_column=0, tag_column=3)[0]
    assert found == [[("#", "O"), ("EU", "B-ORG")]]


@pytest.mark.parametrize(
    ("comment", "words", "settings"),
    [
        ("#\thttp://de.wikipedia.org/wiki/Korfmann [2009-10-17]", "1\tAnton\tB-PER\tO", (1, 2)),
        ("# text = a\tb\n# sent_id = 1", "1\tAnton\tAnton\tB-PER\t_", (1, 3)),
        ("# id f423a88e-02b7-4d61\tdomain=en", "Anton _ _ B-PER", (0, 3)),  # MultiCoNER
    ],
)
def test_a_comment_may_have_tabs(comment, words, settings, tmp_path):
    (tmp_path / "a.txt").write_text(f"{comment}\n{words}\n\n{comment}\n{words}\n{words}\n")
    word, tag = settings
    found = read(tmp_path / "a.txt", word_column=word, tag_column=tag)[0]
    assert found == [[("Anton", "B-PER")], [("Anton", "B-PER")] * 2]


def test_a_word_that_begins_with_a_hash_is_no_comment(tmp_path):
    (tmp_path / "a.txt").write_text("# O\n\n#1 O\nfan O\n\nis O\n# O\n")
    found = read(tmp_path / "a.txt", word_column=0, tag_column=1)[0]
    assert [[word for word, _ in words] for words in found] == [["#"], ["#1", "fan"], ["is", "#"]]


@pytest.mark.parametrize("line", ["\u00a0", "\ufeff"])
def test_a_line_of_unusual_spaces_is_not_a_word(line, tmp_path):
    (tmp_path / "a.txt").write_text(f"{line}\nEU\tB-ORG\n")
    assert read(tmp_path / "a.txt", word_column=0, tag_column=1)[0] == [[("EU", "B-ORG")]]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"2\tword", "a.conllu:2 has 2 columns, but 1 and 3"),
        (b"2\t\xff\t_\tX", "a.conllu:2 is not valid UTF-8 at byte 2"),
        (b"2\tword\t_\t ", "a.conllu:2 has no label"),
    ],
)
def test_a_sentence_with_a_bad_line_is_named_or_skipped_and_counted(line, said, tmp_path):
    good = b"1\ta\t_\tX\n"
    (tmp_path / "a.conllu").write_bytes(good + line + b"\n\n" + good)
    with pytest.raises(UserError) as error:
        read(tmp_path / "a.conllu")
    assert said in str(error.value)
    found, counts = read(tmp_path / "a.conllu", on_invalid="skip")
    assert (found, counts.invalid) == ([[("a", "X")]], 1)


WORDS = ["Zoë", "walks", "to", "\u200b", "naïve", "中国", ",", "unbelievably", "slowly", "…"]


def tagged(folder, sentences=30):
    """Random sentences in a file, one of their words without a token in most vocabularies."""
    rng = np.random.default_rng(0)
    drawn = [[WORDS[i] for i in rng.integers(len(WORDS), size=rng.integers(1, 12))]
             for _ in range(sentences)]  # fmt: skip
    text = "".join(
        "".join(f"{n}\t{word}\t_\tT{WORDS.index(word)}\n" for n, word in enumerate(words)) + "\n"
        for words in drawn
    )
    (folder / "a.conllu").write_text(text)
    return drawn


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bpe", "bytes"])
def test_every_word_keeps_its_tag_in_the_rows(kind, tmp_path):
    drawn = tagged(tmp_path)
    data = TextData(
        source=TaggedSource(str(tmp_path / "a.conllu")),
        tokenizer=TokenizerConfig(kind, vocab_size=60 if kind == "wordpiece" else 286),
        validation_fraction=0,
        shards=1,
    )
    prepared = prepare(data, tmp_path / "store")
    objective = TokenClassification()
    examples = prepared.examples("train", objective.window_spec(16))
    assert len(examples) > len(drawn)  # some are longer than a row
    found: dict[int, list[str]] = {}
    read: dict[int, list[str]] = {}
    for number in range(len(examples)):
        raw = examples.read(number, None)
        row = objective.prepare(raw, None, prepared.vocabulary, 16)
        document = examples.document_of(number)
        tags = row["labels"][row["weights"] > 0]
        found.setdefault(document, []).extend(prepared.label_names[tag] for tag in tags)
        firsts = np.flatnonzero(row["weights"])
        assert firsts[0] == 1  # behind [CLS]
        words = np.split(raw["tokens"], firsts[1:] - 1)
        read.setdefault(document, []).extend(map(prepared.tokenizer.decode, words))
    assert [found[i] for i in range(len(drawn))] == [
        [f"T{WORDS.index(word)}" for word in words] for words in drawn
    ]
    if kind == "bytes":
        # A tag is at the first byte of its word: the space before it tells nothing.
        assert [[word.rstrip() for word in read[i]] for i in range(len(drawn))] == drawn
