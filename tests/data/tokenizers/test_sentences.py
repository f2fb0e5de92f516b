from __future__ import annotations

import random

import pytest

from flax_transformers.data.tokenizers.sentences import MAX_CHARACTERS, split_sentences


@pytest.mark.parametrize(
    "sentences",
    [
        ["It rained. ", "We left at 3.5 km. ", "Why?  ", "Because!\n", "So it goes."],
        ["Dr. Smith met J. S. Bach, e.g. in May, vs. Mr. Handel. ", "They sang."],
        ['"Stop!" he said. ', "(Nobody did.) ", '"Go on," she said. ', "“Yes.” ", "No… ", "Well."],
        ["So do I. ", "Then we agree."],
        ["He waited ... and waited. ", "Nothing."],
        ["A line\nwrapped at a width.\n", "Another one."],
        ["A heading\n\n", "then a paragraph\n \n", "and one after Mr.\n\n", "the end"],
        ["今日は雨だ。", "「本当\uff1f」", "はい。"],
        ["क्या हुआ। ", "कुछ नहीं।"],
        ["no end at all"],
        ["\n\n  Leading space. ", "More.  \n"],
    ],
)
def test_text_splits_where_its_sentences_end(sentences):
    assert split_sentences("".join(sentences)) == sentences


def test_an_empty_text_has_no_sentence_and_a_blank_one_is_kept():
    assert split_sentences("") == []
    assert split_sentences(" \n\n ") == [" \n\n "]


def test_sentences_together_are_the_text_exactly():
    letters = random.Random(0)
    alphabet = "aB .!?…\n\t\"')。」１é\u2028\u3000\0"
    for _ in range(3000):
        text = "".join(letters.choices(alphabet, k=letters.randrange(40)))
        parts = split_sentences(text)
        assert "".join(parts) == text
        assert all(parts)


def test_a_stretch_without_an_end_is_cut_at_whitespace():
    text = "some " * MAX_CHARACTERS + "words " * MAX_CHARACTERS
    parts = split_sentences(text)
    assert "".join(parts) == text
    assert all(part.endswith(("some ", "words ")) and len(part) <= MAX_CHARACTERS for part in parts)
    assert list(map(len, split_sentences("x" * (2 * MAX_CHARACTERS + 1)))) == [
        MAX_CHARACTERS, MAX_CHARACTERS, 1,
    ]  # fmt: skip


@pytest.mark.parametrize("unit", [".", "\n ", ".'", " ", "。", "x", "\n\t", ")."])
def test_a_million_equal_characters_do_not_take_quadratic_time(unit):
    text = unit * (1_000_000 // len(unit))  # quadratic time would be an hour here
    assert "".join(split_sentences(text)) == text
