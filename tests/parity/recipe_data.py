"""Files in the format of a recipe's own, for runs of one step."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import PIL.Image

from flax_transformers.data.config import TextData
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.mixture import MixedText
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.post_training.problems import Problems

VOCABULARY = "400"
TAGS = ("DET", "NOUN", "VERB")


def words():
    random = np.random.default_rng(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    return ["".join(random.choice(syllables, random.integers(1, 4))) for _ in range(300)]


WORDS = words()


def sentence(random):
    return " ".join(random.choice(WORDS, 9)).capitalize() + "."


def texts(source, folder, random):
    if ".json" in source.path:
        file = folder / "text.jsonl"
        rows = [{source.text_field: [sentence(random) for _ in range(9)]} for _ in range(60)]
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    else:
        file = folder / "text.txt"
        between = "\n" if source.documents == "line" else "\n\n"
        file.write_text(
            between.join(" ".join(sentence(random) for _ in range(9)) for _ in range(60))
        )
    return file


def pairs(source, folder, random):
    file = folder / "pairs.tsv"
    file.write_text("".join(f"{sentence(random)}\t{sentence(random)}\n" for _ in range(300)))
    return file


def tagged(source, folder, random):
    lines = []
    for _ in range(80):
        for number, word in enumerate(random.choice(WORDS, 7), 1):
            tag = TAGS[WORDS.index(word) % 3]
            lines.append(f"{number}\t{word}\t{word}\t{tag}\t_\t_\t0\t_\t_\t_")
        lines.append("")
    file = folder / "words.conllu"
    file.write_text("\n".join(lines) + "\n")
    return file


def labelled(source, folder, random):
    file = folder / "labelled.json"
    rows = [[sentence(random), TAGS[number % 3]] for number in range(200)]
    file.write_text(json.dumps({"train": rows, "test": rows[:40]}))
    return file


def questions(source, folder, random):
    articles = []
    for number in range(60):
        context = " ".join(random.choice(WORDS, 20))
        answer = context.split()[number % 20]
        asked = {
            "id": str(number),
            "question": " ".join(random.choice(WORDS, 5)),
            "answers": [{"text": answer, "answer_start": context.index(answer)}],
        }
        articles.append(
            {"title": str(number), "paragraphs": [{"context": context, "qas": [asked]}]}
        )
    file = folder / "questions.json"
    file.write_text(json.dumps({"version": "1.1", "data": articles}))
    return file


def images(source, folder, random):
    for label in range(10):
        (folder / "images" / str(label)).mkdir(parents=True)
        for number in range(8):
            pixels = random.integers(0, 255, (28, 28), np.uint8)
            file = folder / "images" / str(label) / f"{number}.png"
            PIL.Image.fromarray(pixels).save(file)
    return folder / "images"


WRITERS: dict[type, Callable] = {
    TextSource: texts,
    PairSource: pairs,
    TaggedSource: tagged,
    LabelledSource: labelled,
    QuestionSource: questions,
    ImageSource: images,
}


def data_arguments(config, folder):
    """Options that give a recipe files written here, and a vocabulary that fits them."""
    data, random = config.data, np.random.default_rng(1)
    if isinstance(data, Problems):
        return []  # it generates its texts
    options = ["--data.store", str(folder / "store")]
    for option, source in sources(data):
        place = folder / option
        place.mkdir()
        options += [f"--data.{option}.path", str(WRITERS[type(source)](source, place, random))]
    if getattr(data, "validation_source", None) is None:
        options += ["--data.validation-fraction", "0.2"]
    if isinstance(data, ImageData):
        return options
    if data.tokenizer.kind != "bytes":
        options += ["--data.tokenizer.vocab-size", VOCABULARY, "--model.vocab-size", VOCABULARY]
        options += last_token(config.model)
    if isinstance(data, TextData) and isinstance(data.source, TaggedSource | LabelledSource):
        options += ["--model.num-labels", str(len(TAGS))]
    return options


def last_token(model):
    """Options that give a model the last token of the smaller vocabulary where it has its own."""
    last, fits = model.vocab_size - 1, str(int(VOCABULARY) - 1)
    options = ["--model.bos-id", fits] if getattr(model, "bos_id", None) == last else []
    ends = getattr(model, "eos_ids", None) == (last,)
    return options + (["--model.eos-ids", fits] if ends else [])


def sources(data):
    """The corpora of a recipe by their option."""
    if isinstance(data, MixedText):
        return [(f"components.{n}.source", one.source) for n, one in enumerate(data.components)]
    if isinstance(data, ImageData) or data.validation_source is None:
        return [("source", data.source)]
    return [("source", data.source), ("validation-source", data.validation_source)]
