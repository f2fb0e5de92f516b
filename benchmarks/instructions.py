"""Generate instructions with answers from real data, for the stages of `assistant_small`.

    python benchmarks/instructions.py data/instructions --data data

Five tasks, of which the last two need no data: the intent of a sentence (CLINC150), the parts of
speech of a sentence of at most ten words (UD English EWT), the translation into English of one in
six languages (Tatoeba), a sum of two numbers, and six digits in order. Files, as JSON lines:

- ``demonstrations.jsonl``: ``prompt`` and ``completion``, for instruction tuning
- ``prompts/TASK.jsonl``: ``prompt`` and ``answer`` of others, for reinforcement learning
- ``preferences.jsonl``: ``prompt``, ``chosen`` and ``rejected``, of the demonstrations' prompts
- ``held_out/TASK.jsonl``: ``prompt`` and ``answer``, from the test sets, none of them in the others
- ``held_out_preferences.jsonl``

A rejected answer is well-formed and wrong: another intent, one other tag, the translation of
another sentence, a sum that is off by 1 or 10, two digits exchanged.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.read import read_documents

Pair = tuple[str, str]
"""Prompt and answer."""

LANGUAGES = {
    "deu": "German", "fra": "French", "spa": "Spanish", "ita": "Italian", "por": "Portuguese",
    "nld": "Dutch",
}  # fmt: skip
WORDS = 10  # most words of a tagged sentence
DEMONSTRATIONS = {"intents": 4500, "tags": 3000, "translations": 5400, "sums": 3000, "digits": 3000}
PROMPTS = {"intents": 10_500, "tags": 2000, "sums": 3000, "digits": 6000}
PREFERENCES = 2500  # of each task, at most
HELD_OUT = 256  # of each task


def intents(data: Path) -> tuple[list[Pair], list[Pair]]:
    """Training and test pairs of CLINC150."""
    found = json.loads(gzip.decompress((data / "clinc150/data_full.json.gz").read_bytes()))
    train, test = (
        [(f"{text} What is the intent?", f" {label.replace('_', ' ')}") for text, label in rows]
        for rows in (found["train"], found["test"])
    )
    return train, test


def tags(data: Path) -> tuple[list[Pair], list[Pair]]:
    """Training and test pairs of universal parts of speech."""

    def pairs(name: str) -> list[Pair]:
        source = TaggedSource(str(data / f"ud_english_ewt/en_ewt-ud-{name}.conllu.gz"))
        found = []
        for _, document in read_documents(source):
            words, labels = document.text, document.labels
            if len(words) <= WORDS:
                text = " ".join(words)
                found.append(
                    (f"{text} What are the tags?", "".join(f" {x.lower()}" for x in labels))
                )
        return found

    return pairs("train"), pairs("test")


def translations(data: Path) -> tuple[list[Pair], list[Pair]]:
    """Pairs of Tatoeba; the last tenth of each language is the test set."""
    train, test = [], []
    with tarfile.open(data / "tatoeba_laser/pairs.tar.gz") as archive:
        for code, name in LANGUAGES.items():
            sides = []
            for side in (code, "eng"):
                stream = archive.extractfile(f"tatoeba.{code}-eng.{side}")
                assert stream is not None
                sides.append(stream.read().decode().splitlines())
            pairs = [
                (f"{source} Translate from {name}:", f" {target}")
                for source, target in zip(*sides, strict=True)
            ]
            cut = len(pairs) * 9 // 10
            train += pairs[:cut]
            test += pairs[cut:]
    return train, test


def sums(count: int, rng: random.Random) -> list[Pair]:
    """Different sums of two numbers below 100."""
    drawn = rng.sample(range(10_000), count)
    return [(f"{n // 100} + {n % 100} =", f" {n // 100 + n % 100}") for n in drawn]


def digits(count: int, rng: random.Random) -> list[Pair]:
    """Different lists of six digits, and the digits in order."""
    drawn = [f"{n:06d}" for n in rng.sample(range(1_000_000), count)]
    return [
        (f"Sort {' '.join(text)} :", "".join(f" {digit}" for digit in sorted(text)))
        for text in drawn
    ]


def wrong(task: str, answer: str, others: Sequence[Pair], rng: random.Random) -> str:
    """A wrong answer of the form of ``answer``; ``others`` are pairs of the same task."""
    if task == "sums":
        return f" {int(answer) + rng.choice((-10, -1, 1, 10))}"
    parts = answer.split()
    if task == "digits" and len(set(parts)) > 1:
        places = [i for i in range(len(parts) - 1) if parts[i] != parts[i + 1]]
        place = rng.choice(places)
        parts[place], parts[place + 1] = parts[place + 1], parts[place]
        return "".join(f" {part}" for part in parts)
    if task == "tags":
        place = rng.randrange(len(parts))
        known = {tag for _, other in others[:500] for tag in other.split()} - {parts[place]}
        parts[place] = rng.choice(sorted(known))
        return "".join(f" {part}" for part in parts)
    if all(other == answer for _, other in others):
        raise ValueError(f"all answers of {task} are {answer!r}; give data with different ones")
    while (other := rng.choice(others)[1]) == answer:
        pass
    return other


def preferences(task: str, pairs: Sequence[Pair], rng: random.Random) -> Iterator[dict[str, str]]:
    for prompt, answer in pairs:
        yield {"prompt": prompt, "chosen": answer, "rejected": wrong(task, answer, pairs, rng)}


def write(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("output", type=Path, help="folder to write to")
    parser.add_argument("--data", type=Path, required=True, help="folder of the three data sets")
    options = parser.parse_args()
    rng = random.Random(0)
    tasks = {name: read(options.data) for name, read in
             (("intents", intents), ("tags", tags), ("translations", translations))}  # fmt: skip
    for name, make in (("sums", sums), ("digits", digits)):
        made = make(DEMONSTRATIONS[name] + PROMPTS[name] + HELD_OUT, rng)
        tasks[name] = made[HELD_OUT:], made[:HELD_OUT]
    demonstrations, prompts, compared, held_out_compared = [], [], [], []
    for task, (train, test) in tasks.items():
        different = sorted(set(test))
        held_out = rng.sample(different, min(HELD_OUT, len(different)))
        answers = [{"prompt": prompt, "answer": answer.strip()} for prompt, answer in held_out]
        write(options.output / f"held_out/{task}.jsonl", answers)
        held_out_compared += preferences(task, held_out, rng)
        unseen = {prompt for prompt, _ in held_out}
        train = sorted({pair for pair in train if pair[0] not in unseen})
        rng.shuffle(train)
        compared += preferences(task, train[:PREFERENCES], rng)
        shown, rest = train[: DEMONSTRATIONS[task]], train[DEMONSTRATIONS[task] :]
        demonstrations += [{"prompt": prompt, "completion": answer} for prompt, answer in shown]
        rest = rest[: PROMPTS.get(task, 0)]
        prompts += [(task, {"prompt": prompt, "answer": answer.strip()}) for prompt, answer in rest]
    for rows in (demonstrations, prompts, compared):
        rng.shuffle(rows)
    write(options.output / "demonstrations.jsonl", demonstrations)
    for task in PROMPTS:
        write(
            options.output / f"prompts/{task}.jsonl", (row for name, row in prompts if name == task)
        )
    write(options.output / "preferences.jsonl", compared)
    write(options.output / "held_out_preferences.jsonl", held_out_compared)


if __name__ == "__main__":
    main()
