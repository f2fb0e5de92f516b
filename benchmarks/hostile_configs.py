"""Test the parsing and checks of the command line with four hundred invalid configs.

    python -m benchmarks.hostile_configs [--cases 400] [--seed 0]

Each case sets one to three fields of a small recipe to NaN, infinity, -1, 0, 1e20, an integer of
400 digits, another type, an empty string or NUL. The values come from the command line, the config
file or a saved config. What `train` checks before it
prepares data is then run in a process with a limit of 10 seconds and 2 GB. A case passes if it is
accepted, or refused with a UserError of one sentence; a traceback, a hang and a kill are failures.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import multiprocessing
import queue
import random
import resource
import sys
import traceback
from collections.abc import Iterator
from typing import Any

SECONDS, MEMORY = 10, 2 * 2**30
VALUES: tuple[Any, ...] = (
    float("nan"), float("inf"), float("-inf"), -1, 0, 1, 1e20, -1e20, 1e-300, 1.5, 10**18, 2**31,
    2**63, -(2**63), 10**400, True, False, None, "", "x", "\0", "²", "\udcff", "nan", "1e20", "-1",
    "a" * 100_000, (), (0,), (1, 2, 3), ("x",), {}, {"type": "bert"}, b"x", object, 3 + 4j, [[]],
)  # fmt: skip
TEXTS = (
    "nan", "inf", "-inf", "-1", "0", "1e20", "1" * 400, "1.5", "", "x", "²", "None", "True", "-",
    "--", "9" * 19, "1_000", " 1", "0x10", "1,2", "[1]", "\udcff",
)  # fmt: skip


NAMED = (
    "chat_tiny", "chat_tiny_reward", "chat_tiny_dpo", "llama_tiny_sorting_grpo", "clip_mnist",
    "vit_mnist_distilled",
)  # fmt: skip
"""Recipes in configs/ of kinds that are not among the small runs below."""


def recipes() -> dict[str, Any]:
    """Small runs of every kind of data and objective."""
    from flax_transformers.cli.config_file import recipe
    from flax_transformers.data.config import TextData
    from flax_transformers.data.images.dataset import ImageData
    from flax_transformers.data.images.kinds import ImageSource
    from flax_transformers.data.mixture import Component, MixedText
    from flax_transformers.data.sources.labelled import LabelledSource
    from flax_transformers.data.sources.pairs import PairSource
    from flax_transformers.data.sources.text import TextSource
    from flax_transformers.data.tokenizers.load import TokenizerConfig
    from flax_transformers.families.bart import BartConfig
    from flax_transformers.families.bert import BertConfig
    from flax_transformers.families.gpt2 import GPT2Config
    from flax_transformers.families.llama import LlamaConfig
    from flax_transformers.families.mae import MaeConfig
    from flax_transformers.families.mixtral import MixtralConfig
    from flax_transformers.families.modernbert import ModernBertConfig
    from flax_transformers.families.t5 import T5Config
    from flax_transformers.families.vit import ViTConfig
    from flax_transformers.objectives.causal_lm import CausalLM
    from flax_transformers.objectives.denoising import Denoising
    from flax_transformers.objectives.image_classification import ImageClassification
    from flax_transformers.objectives.masked_image import MaskedImage
    from flax_transformers.objectives.masked_lm import MaskedLM
    from flax_transformers.objectives.mixture_of_denoisers import MixtureOfDenoisers
    from flax_transformers.objectives.sequence_classification import SequenceClassification
    from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
    from flax_transformers.objectives.span_corruption import SpanCorruption
    from flax_transformers.optim.optimizers import LAMB, Adafactor, Lion
    from flax_transformers.testing import tiny_config
    from flax_transformers.training.config import ImagePhase

    layers: dict[str, Any] = {
        "hidden_size": 16, "num_layers": 2, "num_heads": 2, "intermediate_size": 32,
    }  # fmt: skip
    text: dict[str, Any] = layers | {"vocab_size": 262, "max_positions": 64, "pad_id": 0}
    kinds = TokenizerConfig("bytes")
    data = TextData(source=TextSource("x.txt"), tokenizer=kinds)
    pairs = TextData(source=PairSource("x.tsv"), tokenizer=kinds)
    labelled = TextData(source=LabelledSource("x.jsonl"), tokenizer=kinds)
    mixed = MixedText(
        components=(Component(name="a", source=TextSource("x.txt"), weight=1.0),), tokenizer=kinds
    )
    images = ImageData(source=ImageSource("images"))
    pixels = (ImagePhase(steps=20, image_size=32, batch_size=16),)
    small_t5 = {name: value for name, value in text.items() if name != "max_positions"}
    classifier = "BertForSequenceClassification"

    def run(model: Any, objective: Any, source: Any = data, **changes: Any) -> Any:
        return tiny_config("x", "store", model=model, objective=objective, data=source, **changes)

    return {
        "bert": run(BertConfig(**text), MaskedLM()),
        "modernbert": run(ModernBertConfig(**text), MaskedLM(), mixed),
        "classes": run(BertConfig(**text, architecture=classifier), SequenceClassification(),
                       labelled, optimizer=LAMB()),
        "gpt2": run(GPT2Config(**text), CausalLM(), optimizer=Lion()),
        "llama": run(LlamaConfig(**text), CausalLM(), mixed),
        "mixtral": run(MixtralConfig(**text, num_key_value_heads=1), CausalLM()),
        "t5": run(T5Config(**small_t5), SpanCorruption(), optimizer=Adafactor()),
        "ul2": run(T5Config(**small_t5), MixtureOfDenoisers()),
        "bart": run(BartConfig(**text), Denoising()),
        "translator": run(BartConfig(**text), SequenceToSequence(), pairs),
        "vit": run(ViTConfig(**layers, image_size=32), ImageClassification(), images,
                   phases=pixels),
        "mae": run(MaeConfig(**layers, image_size=32), MaskedImage(), images, phases=pixels),
    } | {name: recipe(name) for name in NAMED}  # fmt: skip


def leaves(config: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all fields that are not dataclasses, and of some that are."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        here = (*path, field.name)
        yield here
        if dataclasses.is_dataclass(value):
            yield from leaves(value, here)
        elif isinstance(value, tuple):
            for number, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    yield from leaves(item, (*here, number))


def changed(config: Any, path: tuple[Any, ...], value: Any) -> Any:
    """``config`` with the field at ``path`` replaced; its classes check their values."""
    first, *rest = path
    if isinstance(config, tuple):
        return tuple(changed(c, tuple(rest), value) if i == first else c
                     for i, c in enumerate(config))  # fmt: skip
    new = changed(getattr(config, first), tuple(rest), value) if rest else value
    return dataclasses.replace(config, **{first: new})


def in_json(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A saved config with the field at ``path`` replaced."""
    first, *rest = path
    new = in_json(node[first], tuple(rest), value) if rest else value
    if isinstance(node, list):
        return [new if i == first else item for i, item in enumerate(node)]
    return {**node, first: new}


def check(config: Any) -> None:
    """The checks of ``train`` before it reads data."""
    import json

    from flax_transformers.config_json import to_json
    from flax_transformers.training.check_run import check_config
    from flax_transformers.training.setup import checked_mesh

    json.dumps(to_json(config))
    checked_mesh(config)
    check_config(config)


def run_case(seed: int) -> tuple[str, str]:
    """The outcome of one case, with the case or the message."""
    from flax_transformers.cli.parsing import override
    from flax_transformers.config_json import from_json, to_json
    from flax_transformers.errors import UserError

    draw = random.Random(seed)
    name, config = draw.choice(sorted(recipes().items()))
    way = draw.choice(("file", "command line", "saved config"))
    paths = draw.sample(list(leaves(config)), draw.choice((1, 1, 1, 2, 3)))
    what = f"{name} {way}"
    try:
        if way == "command line":
            arguments = []
            for path in paths:
                value = draw.choice(TEXTS)
                what += f" {'.'.join(map(str, path))}={value[:40]!r}"
                option = "--" + ".".join(map(str, path)).replace("_", "-")
                arguments.append(f"{option}={value}")
            config = override(config, arguments)
        else:
            saved = to_json(config)
            for path in paths:
                value = draw.choice(VALUES)
                shown = "10**400" if value == 10**400 else repr(value)[:40]
                what += f" {'.'.join(map(str, path))}={shown}"
                try:
                    if way == "file":
                        config = changed(config, path, value)
                    else:
                        saved = in_json(saved, path, value)
                except ValueError as error:  # as `load_config` reports it
                    raise UserError(str(error)) from error
                except (TypeError, KeyError, AttributeError):  # an earlier change removed it
                    continue
            if way == "saved config":
                config = from_json(saved)
                if type(config).__name__ != "TrainConfig":
                    raise UserError("it is no TrainConfig")
        check(config)
    except UserError as error:
        said = str(error)
        if "\n" in said.strip() or not said.strip() or len(said) > 1000:
            return "no sentence", f"{what}: {said[:300]}"
        return "refused", f"{what}: {said}"
    except SystemExit as stop:
        return "exit", f"{what}: exit {stop.code}"
    except BaseException:
        return "traceback", f"{what}: {traceback.format_exc()}"
    return "accepted", what


def work(seeds: Any, results: Any) -> None:
    """Runs the cases of a queue; the memory limit is that of the process."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.devices()
    recipes()
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # noqa: SIM115
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    while (seed := seeds.get()) is not None:
        results.put((seed, "began", ""))
        results.put((seed, *run_case(seed)))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print the message of every case")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    wanted = [arguments.seed * 1_000_003 + case for case in range(arguments.cases)]
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    worker = None
    seeds = results = None
    for seed in wanted:
        if worker is None or seeds is None or results is None:
            seeds, results = context.Queue(), context.Queue()
            worker = context.Process(target=work, args=(seeds, results), daemon=True)
            worker.start()
        seeds.put(seed)
        try:
            results.get(timeout=120)  # the process starts, once
            _, outcome, what = results.get(timeout=SECONDS)
        except queue.Empty:
            outcome, what = ("hang" if worker.is_alive() else "killed"), f"seed {seed}"
            worker.kill()
            worker = None
        counts[outcome] += 1
        if outcome not in ("accepted", "refused"):
            failures.append(f"{outcome} (seed {seed}): {what}")
            print(failures[-1], flush=True)
        elif arguments.show:
            print(f"{outcome} (seed {seed}): {what[:400]}", flush=True)
    if worker is not None and seeds is not None:
        seeds.put(None)
        worker.join()
    print(f"\n{'outcome':<14}cases")
    for outcome, count in counts.most_common():
        print(f"{outcome:<14}{count}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
