"""Makes questions out of any text, to learn to read with before there are real ones.

    python benchmarks/cloze_questions.py data/standardebooks_en/books.jsonl.gz cloze.json

A sentence with a gap, some of its other words left out, asks for what stood in the gap; the text
around the sentence holds the answer (as in arXiv:1906.04980, without its translation into real
questions). In: a JSON line per document with a list of ``paragraphs``. Out: the format of SQuAD.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flax_transformers.data.files import lines
from flax_transformers.data.sentences import split_sentences

WORD = re.compile(r"\w[\w'’-]*")
ASKING = ("what", "who", "when", "where", "which", "how many")
SHORTEST = 4  # letters of a word that is worth asking for


def paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    """(document, paragraph) of all documents, line ends as spaces."""
    for number, (_, line) in enumerate(lines(path)):
        for paragraph in json.loads(line)["paragraphs"]:
            yield f"document {number}", " ".join(paragraph.split())


def question(context: str, rng: np.random.Generator) -> tuple[str, int, str] | None:
    """A question on ``context``, and where its answer begins; None if no sentence will do."""
    sentences = split_sentences(context)
    starts = np.cumsum([0, *map(len, sentences)])
    for place in rng.permutation(len(sentences)).tolist():
        words = list(WORD.finditer(sentences[place]))
        if not 6 <= len(words) <= 20:
            continue
        worth = [i for i, w in enumerate(words) if len(w[0]) >= SHORTEST or w[0][0].isupper()]
        worth = [i for i in worth if i] or [1]
        first = int(rng.choice(worth))
        last = min(len(words) - 1, first + int(rng.integers(0, 3)))
        kept = [
            word[0] for i, word in enumerate(words) if not first <= i <= last and rng.random() < 0.8
        ]
        start = int(starts[place]) + words[first].start()
        answer = context[start : int(starts[place]) + words[last].end()]
        return f"{rng.choice(ASKING)} {' '.join(kept)}?", start, answer
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--words", type=int, nargs=2, default=(20, 45), help="of a paragraph")
    parser.add_argument("--questions", type=int, default=30_000)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    articles: dict[str, list[dict[str, Any]]] = {}
    made = 0
    for title, context in paragraphs(arguments.text):
        shortest, longest = arguments.words
        if not shortest <= len(context.split()) <= longest or made == arguments.questions:
            continue
        found = question(context, rng)
        if found is not None:
            text, start, answer = found
            answers = [{"text": answer, "answer_start": start}]
            asked = {"id": str(made), "question": text, "answers": answers}
            articles.setdefault(title, []).append({"context": context, "qas": [asked]})
            made += 1
    data = [{"title": title, "paragraphs": found} for title, found in articles.items()]
    arguments.output.write_text(json.dumps({"version": "1.1", "data": data}))
    print(f"{made:,} questions in {arguments.output}")


if __name__ == "__main__":
    main()
