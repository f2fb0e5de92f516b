"""Generate cloze questions from any text, to pretrain question answering.

    python benchmarks/cloze_questions.py cloze.json data/standardebooks_en/books.jsonl.gz \\
        data/xquad/xquad.en.json.gz

A question is a sentence with a gap, in which some other words are removed or moved. The answer is
the text of the gap, and the context is the text around the sentence (as in arXiv:1906.04980, but
without its translation into natural questions). Input: one JSON line per document with a list of
``paragraphs``, or SQuAD's format, of which contexts and titles are used. Output: SQuAD's format.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flax_transformers.data.sources.files import open_decompressed
from flax_transformers.data.sources.records import LineFile
from flax_transformers.data.tokenizers.sentences import split_sentences

WORD = re.compile(r"\w[\w'’,.-]*\w|\w")
NUMBERS = frozenset(
    "two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty sixty "
    "hundred thousand million".split()
)
COMMON = frozenset(
    "the a an of to in on at by for with from and or but that this it its is was were are be been "
    "had has have he she they his her their as not no so which who i you we him them me my your "
    "if when then there what would could should will can may do did said all any some one".split()
)
ASKING = {
    "year": ("when", "in what year", "when"),
    "number": ("how many", "how much", "how many", "what"),
    "name": ("who", "where", "what", "which", "who"),
    "other": ("what", "what", "which", "how"),
}
LONGEST_ANSWER = 5  # words
FURTHEST = 9  # largest number of words on each side of the gap


def contexts(
    path: Path, words: tuple[int, int], share: float, rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    """(title, context) of all documents, line ends as spaces.

    Contexts of books are neighbouring sentences with a random number of ``words`` between the two
    limits; a ``share`` of them is used. Contexts of SQuAD's format are unchanged.
    """
    if path.name.endswith((".json", ".json.gz")):
        with open_decompressed(path) as stream:
            articles = json.loads(stream.read())["data"]
        for article in articles:
            for paragraph in article["paragraphs"]:
                yield article["title"], paragraph["context"]
        return
    for number, row in enumerate(LineFile(path).read(0, None)):
        paragraphs = json.loads(row.content)["paragraphs"]
        text = " ".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        joined, count, wanted = "", 0, rng.integers(*words)
        for sentence in split_sentences(text):
            joined, count = joined + sentence, count + len(sentence.split())
            if count >= wanted:
                if count <= words[1] and rng.random() < share:
                    yield f"{path.name} {number}", joined.strip()
                joined, count, wanted = "", 0, rng.integers(*words)


def kind_of(word: str) -> str:
    """The kind of question for a word. Words at the start of a sentence do not count as names."""
    if re.fullmatch(r"(1\d|20)\d\d", word):
        return "year"
    if word[0].isdigit() or word.lower() in NUMBERS:
        return "number"
    return "name" if word[0].isupper() and len(word) > 1 else "other"


def gap(words: list[str], rng: np.random.Generator) -> tuple[int, int, str]:
    """First and last word of an answer, and its kind. Names and numbers are preferred."""
    kinds = ["other", *map(kind_of, words[1:])]
    telling = [i for i, kind in enumerate(kinds) if kind != "other"]
    if telling and rng.random() < 0.7:
        first = int(rng.choice(telling))
        last = first
        while kinds[first - 1] == kinds[first] == "name":
            first -= 1
        while last + 1 < len(words) and kinds[last + 1] == kinds[first] == "name":
            last += 1
        if kinds[first] == "number" and rng.random() < 0.3:
            last += 1  # the counted noun
    else:
        worth = [i for i, word in enumerate(words) if word.lower() not in COMMON]
        last = int(rng.choice(worth or [0]))
        first = max(0, last - int(rng.choice(3, p=(0.5, 0.3, 0.2))))
        while first < last and words[first].lower() in COMMON:
            first += 1
    return first, min(last, len(words) - 1, first + LONGEST_ANSWER - 1), kinds[first]


def question(words: list[str], first: int, last: int, kind: str, rng: np.random.Generator) -> str:
    """Words around the gap, with some removed, and often with those after the gap first."""

    def kept(some: list[str]) -> list[str]:
        left_out = rng.random(len(some))
        chance = [0.35 if word.lower() in COMMON else 0.15 for word in some]
        return [word for word, x, p in zip(some, left_out, chance, strict=True) if x >= p]

    before = kept(words[max(0, first - FURTHEST) : first])
    after = kept(words[last + 1 : last + 1 + FURTHEST])
    asking = [str(rng.choice(ASKING[kind]))]
    if not before and not after:
        return ""
    orders = [asking + before + after, asking + after + before, before + asking + after]
    return " ".join(orders[rng.choice(3, p=(0.4, 0.4, 0.2))]) + "?"


def questions(context: str, most: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """At most so many questions about ``context``, from random sentences."""
    sentences = split_sentences(context)
    starts = np.cumsum([0, *map(len, sentences)])
    asked = []
    for place in rng.permutation(np.arange(most) % len(sentences)).tolist():
        found = list(WORD.finditer(sentences[place]))
        if len(found) < 5:
            continue
        words = [word[0] for word in found]
        first, last, kind = gap(words, rng)
        text = question(words, first, last, kind, rng)
        start = int(starts[place]) + found[first].start()
        answer = context[start : int(starts[place]) + found[last].end()]
        if text:
            answers = [{"text": answer, "answer_start": start}]
            asked.append({"question": text, "answers": answers})
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument(
        "--words",
        type=int,
        nargs=2,
        default=(16, 72),
        help="smallest and largest number of words of a context",
    )
    parser.add_argument(
        "--share", type=float, default=0.4, help="share of the contexts of books that is used"
    )
    parser.add_argument("--each", type=int, default=1, help="questions per context of a book")
    parser.add_argument(
        "--each-asked", type=int, default=20, help="questions per context of SQuAD's format"
    )
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    articles: dict[str, list[dict[str, Any]]] = {}
    made = 0
    for path in arguments.texts:
        each = arguments.each_asked if ".json" in path.suffixes else arguments.each
        for title, context in contexts(path, arguments.words, arguments.share, rng):
            asked = questions(context, each, rng)
            for one in asked:
                one["id"] = str(made := made + 1)
            articles.setdefault(title, []).append({"context": context, "qas": asked})
    data = [{"title": title, "paragraphs": found} for title, found in articles.items()]
    arguments.output.write_text(json.dumps({"version": "1.1", "data": data}))
    print(f"{made:,} questions on {len(articles):,} documents in {arguments.output}")


if __name__ == "__main__":
    main()
