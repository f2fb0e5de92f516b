"""Rate at which one process produces training examples, and a breakdown of its time.

    python benchmarks/data.py [--text FILE_OR_FOLDER] [--seconds 2] > result.md

Figures are for one process, per second of its CPU time, the median of three measurements, so that
other jobs on the machine have little influence. The default text is the documentation of Python.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from about import about

from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import Dataset, prepare
from flax_transformers.data.images.augmentation import Augmentation, augmented
from flax_transformers.data.images.dataset import ImageData, PreparedImages
from flax_transformers.data.images.decode import decode_image
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.pipeline.loader import Examples, TrainStream
from flax_transformers.data.prepare.text import PreparedText
from flax_transformers.data.sources.conllu import TaggedSource
from flax_transformers.data.sources.labelled import LabelledSource
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.sources.read import read_documents
from flax_transformers.data.sources.squad import QuestionSource
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.encoding import encode_sentences
from flax_transformers.data.tokenizers.load import Kind, TokenizerConfig, train_tokenizer
from flax_transformers.data.tokenizers.sentences import split_sentences
from flax_transformers.monitoring.device_specs import device_spec
from flax_transformers.objectives.base import Objective, Vocabulary
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.denoising import Denoising
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.objectives.mixture_of_denoisers import MixtureOfDenoisers
from flax_transformers.objectives.next_sentence import NextSentence
from flax_transformers.objectives.prefix_lm import PrefixLM
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.rows import pad
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.objectives.span_corruption import BYT5_MEAN_SPAN, SpanCorruption
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.setup import phase_flops

LENGTH, BATCH = 512, 64
MFU, DEVICES, DEVICE = 0.4, 8, "TPU v5e"
PEAK = device_spec(DEVICE).peak_flops
OBJECTIVES: dict[str, tuple[str, Objective]] = {
    "masked tokens (RoBERTa)": ("pieces", MaskedLM()),
    "whole words (BERT)": ("pieces", MaskedLM(choose="word")),
    "spans masked (SpanBERT)": ("pieces", MaskedLM(choose="span")),
    "masked tokens and next sentence (BERT)": ("pieces", NextSentence()),
    "causal (GPT)": ("pieces", CausalLM()),
    "prefix": ("pieces", PrefixLM()),
    "span corruption (T5)": ("pieces", SpanCorruption()),
    "span corruption of bytes (ByT5)": ("bytes", SpanCorruption(mean_span=BYT5_MEAN_SPAN)),
    "mixture of denoisers (UL2)": ("pieces", MixtureOfDenoisers()),
    "denoising (BART)": ("pieces", Denoising()),
    "pairs (Transformer)": ("pairs", SequenceToSequence()),
    "classes of two texts (BERT)": ("classes", SequenceClassification()),
    "tags of words (BERT)": ("tags", TokenClassification()),
    "answers in a text (BERT)": ("questions", QuestionAnswering()),
}
RECIPES = {
    "bert_base": "pieces",
    "roberta_base": "pieces",
    "gpt2_small": "pieces",
    "t5_v1_1_base_c4": "pieces",
    "byt5_small": "bytes",
    "ul2_base": "pieces",
    "bart_base": "pieces",
    "transformer_wmt14": "pairs",
    "bert_base_mnli": "classes",
    "bert_base_squad": "questions",
    "vit_s16_imagenet2012": "images",
    "deit3_b16_imagenet2012": "images",
    "mae_b16_imagenet2012": "images",
}
PICTURES, PICTURE_SIDES = 128, (375, 500)
POLICIES = {
    "centre crop": Augmentation(),
    "random part, flip (MAE)": Augmentation(crop="resized", flip=0.5),
    "and RandAugment": Augmentation(crop="resized", flip=0.5, policy="rand_augment"),
    "and 3-Augment (DeiT III)": Augmentation(
        crop="resized", flip=0.5, policy="three_augment", color_jitter=0.3
    ),
}


@dataclasses.dataclass(frozen=True)
class NoObjective:
    """The unchanged ids of an example, padded to a fixed length."""

    def prepare(
        self,
        example: dict[str, np.ndarray],
        rng: np.random.Generator,
        vocab: Vocabulary,
        sequence_length: int,
    ) -> dict[str, np.ndarray]:
        names = [name for name in example if name.endswith("tokens")]
        return {name: pad(example[name][: 2 * LENGTH], 2 * LENGTH, 0) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", default="embedded", help="a file or folder of text")
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU time per measurement")
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core, as in a process of `prepare`
    print(f"# Making training examples, {time.strftime('%Y-%m-%d')}\n\n{_machine()}\n")
    with tempfile.TemporaryDirectory() as scratch:
        prepared = _stores(Path(scratch), arguments.text)
        pictures = _pictures(Path(scratch) / "pictures")
        _objectives(prepared, arguments.seconds)
        _tokenisation(prepared, arguments.text, arguments.seconds)
        _augmentation(pictures, arguments.seconds)
        _recipes(prepared, pictures, arguments.seconds)


def _machine() -> str:
    described = ", ".join(f"{name} {value}" for name, value in about().items())
    shape = f"Rows of {LENGTH}, batches of {BATCH}."
    return f"{described}. One process; CPU time, median of three. {shape}"


def _stores(scratch: Path, path: str) -> dict[str, PreparedText]:
    """The text as tokens and as bytes; neighbouring sentences as pairs, with one of two classes and
    with one of two tags per word; questions about three words of a document."""
    source = TextSource(path)
    pairs, tags, questions = (scratch / name for name in ("pairs.jsonl", "tags.tsv", "squad.json"))
    articles = []
    with pairs.open("w") as file, tags.open("w") as tagged:
        for _, document in itertools.islice(read_documents(source), 20_000):
            sentences = split_sentences(document.whole)
            for number, (one, other) in enumerate(itertools.pairwise(sentences)):
                row = {"source": one, "target": other, "label": number % 2}
                file.write(json.dumps(row) + "\n")
                words = [
                    f"{place}\t{word}\t{place % 2}\n" for place, word in enumerate(one.split())
                ]
                tagged.write("".join(words) + "\n")
            articles.append(_question(document.whole, len(articles)))
    questions.write_text(json.dumps({"data": articles}))
    pieces = TokenizerConfig("unigram", 8000, sentinels=100, training_documents=20_000)
    data = {
        "pieces": TextData(source=source, tokenizer=pieces),
        "bytes": TextData(source=source, tokenizer=TokenizerConfig("bytes")),
        "pairs": TextData(source=PairSource(str(pairs)), tokenizer=pieces),
        "classes": TextData(
            source=LabelledSource(str(pairs), text_field="source", second_field="target"),
            tokenizer=pieces,
        ),
        "tags": TextData(
            source=TaggedSource(str(tags), word_column=1, tag_column=2), tokenizer=pieces
        ),
        "questions": TextData(
            source=QuestionSource(str(questions), on_invalid="skip"), tokenizer=pieces
        ),
    }
    one_process = {
        name: dataclasses.replace(one, prepare_processes=1) for name, one in data.items()
    }
    return {name: prepare(one, scratch / name) for name, one in one_process.items()}


def _question(text: str, number: int) -> dict[str, Any]:
    """An article in SQuAD's format, whose answer is in its middle."""
    text = text[:3000]  # twice the length of SQuAD's longest
    middle = len(text) // 2
    answer = {"text": text[middle : middle + 12], "answer_start": middle}
    asked = {"id": str(number), "question": "What stands in the middle?", "answers": [answer]}
    return {"title": str(number), "paragraphs": [{"context": text, "qas": [asked]}]}


def _pictures(folder: Path) -> Path:
    """Smooth shapes with noise, as JPEG files of about the size and length of ImageNet's."""
    height, width = PICTURE_SIDES
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        rough = PIL.Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        smooth = np.asarray(rough.resize((width, height), PIL.Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        path = folder / "train" / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(noisy).save(path, quality=90)
    return folder


def _rate(step: Callable[[], object], seconds: float) -> float:
    """Calls of ``step`` per second of CPU time: the median of three measurements."""
    step()
    rates = []
    for _ in range(3):
        count, start = 0, time.process_time()
        while (spent := time.process_time() - start) < seconds / 3:
            step()
            count += 1
        rates.append(count / spent)
    return statistics.median(rates)


def _rows_per_second(prepared: Dataset, objective: Objective, length: int, seconds: float) -> float:
    examples = _examples(prepared, objective, length)
    return _stream_rate(examples, objective, prepared, length, seconds)


def _examples(prepared: Dataset, objective: Objective, length: int) -> Examples:
    examples = prepared.examples("train", objective.window_spec(length))
    assert examples is not None
    return examples


def _stream_rate(
    examples: Examples, objective: Any, prepared: Dataset, length: int, seconds: float
) -> float:
    with TrainStream(
        examples, objective, prepared.vocabulary, sequence_length=length, batch_size=BATCH, seed=0
    ) as stream:
        return BATCH * _rate(lambda: next(stream), seconds)


def _objectives(stores: dict[str, PreparedText], seconds: float) -> None:
    rows = []
    for name, (store, objective) in OBJECTIVES.items():
        prepared = stores[store]
        examples = _examples(prepared, objective, LENGTH)
        plain = _stream_rate(examples, NoObjective(), prepared, LENGTH, seconds)
        whole = _stream_rate(examples, objective, prepared, LENGTH, seconds)
        read = _rate(_each(lambda i, rng, e=examples: e.read(i, rng), len(examples)), seconds)
        some = [examples.read(i % len(examples), np.random.default_rng(i)) for i in range(256)]
        prepare = _rate(
            _each(
                lambda i, rng, o=objective, p=prepared, s=some: o.prepare(
                    s[i % 256], rng, p.vocabulary, LENGTH
                ),
                256,
            ),
            seconds,
        )
        rest = 1 / whole - 1 / read - 1 / prepare
        shares = [1 / read * whole, 1 / prepare * whole, rest * whole]
        rows.append(
            (
                name,
                f"{whole * LENGTH / 1e6:.2f} M",
                f"{whole / plain:.2f}",
                f"{1e6 / whole:.0f}",
                *(f"{share:.0%}" for share in shares),
            )
        )
    print("## From the token store\n")
    heads = ("objective", "tokens/s", "of reading alone", "µs a row", "read", "prepare", "stream")
    _table(heads, rows)
    print(
        "\nTokens count as places of a row, padding of short texts too. *Of reading alone*: beside "
        "the same windows read, shuffled and stacked with no objective. *Stream*: order, random "
        "generators, stacking.\n"
    )


def _each(call: Callable[[int, np.random.Generator], object], count: int) -> Callable[[], object]:
    numbers = itertools.cycle(range(count))
    rng = np.random.default_rng(0)
    return lambda: call(next(numbers), rng)


def _tokenisation(stores: dict[str, PreparedText], path: str, seconds: float) -> None:
    texts = [d.whole for _, d in itertools.islice(read_documents(TextSource(path)), 2000)]
    kinds = {"unigram": stores["pieces"].tokenizer, "bytes": stores["bytes"].tokenizer}
    trained: tuple[Kind, ...] = ("wordpiece", "byte_level_bpe")
    kinds |= {kind: train_tokenizer(TokenizerConfig(kind, 8000), texts) for kind in trained}
    rows = []
    for name, tokenizer in kinds.items():
        tokens = np.mean([len(ids) for ids in tokenizer.encode_batch(texts)])

        def alone(i: int, rng: np.random.Generator, encode: Any = tokenizer.encode_batch) -> Any:
            return encode([texts[i]])

        documents = _for_ever(path)

        def online(tokenizer: Any = tokenizer, read: Any = documents) -> Any:
            return list(encode_sentences(tokenizer, [next(read)]))

        encode = _rate(_each(alone, len(texts)), seconds)
        whole = _rate(online, seconds)
        rows.append((name, f"{whole * tokens / 1e6:.2f} M", f"{whole / encode:.2f}"))
    print("## Tokenising, a document at a time\n")
    _table(("tokenizer", "tokens/s", "of the tokenizer alone"), rows)
    print("\nReading, checking and finding the ends of sentences included.\n")


def _for_ever(path: str) -> Iterator[str]:
    while True:
        for _, document in itertools.islice(read_documents(TextSource(path)), 2000):
            yield document.whole


def _augmentation(pictures: Path, seconds: float) -> None:
    files = sorted(path.read_bytes() for path in pictures.rglob("*.jpg"))
    decoding = _rate(_each(lambda i, rng: decode_image(files[i], 3), len(files)), seconds)
    pixels = decode_image(files[0], 3)
    rows = [("decoding", f"{decoding:.0f}")]
    for name, policy in POLICIES.items():
        rate = _rate(
            _each(lambda i, rng, p=policy: augmented(pixels, 224, p, 0.875, rng), 1), seconds
        )
        rows.append((name, f"{rate:.0f}"))
    print("## Augmentation\n")
    height, width = PICTURE_SIDES
    _table((f"of a picture of {width} x {height}, to 224 x 224", "images/s"), rows)
    size = sum(map(len, files)) / len(files) / 1000
    print(f"\nPictures are JPEG files of {size:.0f} kB. Decoding is in its own row alone.\n")


def _recipes(stores: dict[str, PreparedText], pictures: Path, seconds: float) -> None:
    speed = PEAK * DEVICES * MFU
    rows = []
    for name, store in RECIPES.items():
        config = _config(name)
        phase = config.phases[-1]
        flops = phase_flops(config, phase) / phase.batch_size
        if isinstance(config.data, ImageData):
            prepared: Dataset = _images(config.data, pictures)
        else:
            prepared = stores[store]
        made = _rows_per_second(prepared, config.objective, phase.sequence_length, seconds)
        needed = speed / flops
        rows.append(
            (
                name,
                str(phase.sequence_length),
                f"{needed:,.0f}",
                f"{made:,.0f}",
                str(math.ceil(needed / made)),
            )
        )
    print(f"## Cores for a host with {DEVICES} chips of {DEVICE} (estimated)\n")
    _table(("recipe", "row length or side", "rows/s trained", "rows/s a core makes", "cores"), rows)
    print(
        f"\n*Rows/s trained* is no measurement: the recipe's FLOPs at an assumed {MFU:.0%} of the "
        f"chips' {PEAK / 1e12:.0f} TFLOP/s. Cores are of this machine."
    )


def _images(data: ImageData, pictures: Path) -> PreparedImages:
    """The pictures, read and augmented as in a recipe."""
    source = ImageSource(str(pictures))
    local = dataclasses.replace(data, source=source, validation_fraction=0.0, store=None)
    return prepare(dataclasses.replace(local, prepare_processes=1), pictures.parent / "images")


def _config(name: str) -> TrainConfig:
    path = Path(__file__).parents[1] / "configs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    for row in (heads, ("---", *["---:"] * (len(heads) - 1)), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    sys.exit(main())
