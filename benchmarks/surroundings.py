"""What surrounds training steps, by this package and by Transformers, side by side.

    python benchmarks/surroundings.py [--torch-python PYTHON] [--json FILE] > result.md

- ``read`` and ``write``: a folder of BERT base with random float32 weights, in the system's file
  cache, with ``load_pretrained`` and ``save_pretrained``, and their namesakes in Transformers.
- ``fine-tune``: a BERT of 4 layers, 256 wide, learns classes of the paragraphs of the embedded
  corpus, cut at 128 tokens, 32 in a step; float32, AdamW, clipping, dropout as published. Theirs is
  ``Trainer``, which pads to the longest paragraph of a batch. Examples a second after the first
  steps.
- ``evaluate``: the same model scores held-out paragraphs, after a first pass that compiles.

Each side runs in a process of its own, and both take turns. Last, for our side alone: seconds of
``--help``, and how a run that saves a checkpoint every 20 steps spends its time. Torch may be in
another environment, with transformers, datasets and accelerate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from about import about

CASES = ("read", "write", "fine-tune", "evaluate")
MODEL = {"num_layers": 4, "hidden_size": 256, "num_heads": 4, "intermediate_size": 1024}
LENGTH, BATCH, STEPS, FIRST_STEPS, CLASSES = 128, 32, 25, 5, 4
TRAINING, HELD_OUT = 4_000, 1_024
"""Paragraphs to train on, and to score."""
SAVE_OFTEN, MANY_STEPS, EVERY = "save-often", 80, 20

Case = Callable[[], float]
"""Does it once; returns bytes or examples a second."""


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=" ".join(CASES))
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the measurements to this file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        _serve(SIDES[options.side](options.folder))
        return
    with tempfile.TemporaryDirectory() as folder:
        _write_paragraphs(Path(folder))
        found = _measured(options, folder)
        alone = _alone(Path(folder))
    print(_table(found))
    print("\n".join(f"- {name}: {text}" for name, text in alone.items()))
    if options.json:
        options.json.write_text(json.dumps({"about": about(), "rates": found, "ours": alone}))


def _write_paragraphs(folder: Path) -> None:
    """Paragraphs of the embedded corpus with classes, and a tokenizer."""
    from flax_transformers.data.sources import embedded
    from flax_transformers.data.tokenizers.load import TokenizerConfig, train_tokenizer

    texts = [
        " ".join(paragraph.split())
        for document in embedded.documents()
        for paragraph in document.split("\n\n")
        if len(paragraph) > 40
    ]
    rows = [{"text": text, "label": f"c{i % CLASSES}"} for i, text in enumerate(texts)]
    for name, part in (
        ("train", rows[:TRAINING]),
        ("held_out", rows[TRAINING : TRAINING + HELD_OUT]),
    ):
        with (folder / f"{name}.jsonl").open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in part)
    train_tokenizer(TokenizerConfig("wordpiece", 4096), texts).save(folder / "tokenizer")


def _measured(options: argparse.Namespace, folder: str) -> dict[str, dict[str, list[float]]]:
    """Rates of each case by side, in turns; the first turn is not counted."""
    from flax_transformers.parallel.host_memory import memory_settings

    sides = {}
    for side, python in (("theirs", options.torch_python), ("ours", sys.executable)):
        command = [python, __file__, "--side", side, "--folder", folder]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        environment = dict(os.environ, JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")
        if side == "ours":
            environment |= memory_settings()  # as the command ``train`` does
        sides[side] = subprocess.Popen(command, env=environment, **pipes)
        _ask(sides[side], "")  # theirs writes the folder that both read
    found: dict[str, dict[str, list[float]]] = {}
    for case in options.cases or CASES:
        found[case] = {side: [] for side in sides}
        for turn in range(options.repeats + 1):
            for side, process in sides.items():
                rate = _ask(process, case)
                if turn:
                    found[case][side].append(rate)
        print(_table({case: found[case]}).splitlines()[-1], file=sys.stderr)
    _ask(sides["ours"], SAVE_OFTEN)
    for process in sides.values():
        process.communicate()
    return found


def _ask(process: subprocess.Popen[str], case: str) -> float:
    assert process.stdin is not None and process.stdout is not None
    if case:
        process.stdin.write(f"{case}\n")
        process.stdin.flush()
    for line in process.stdout:  # libraries print there too
        if line.startswith("rate "):
            return float(line.split()[1])
    raise SystemExit("a side of the comparison ended; see its error above")


def _serve(cases: dict[str, Case]) -> None:
    print("rate 0", flush=True)
    for line in sys.stdin:
        print(f"rate {cases[line.strip()]()}", flush=True)


def _folder_case(folder: Path, act: Callable[[], Any]) -> Case:
    def case() -> float:
        started = time.perf_counter()
        act()
        seconds = time.perf_counter() - started
        return (folder / "bert" / "model.safetensors").stat().st_size / seconds

    return case


def _rate_of_steps(times: list[float]) -> float:
    """Examples a second after the first steps."""
    return BATCH * (len(times) - FIRST_STEPS) / (times[-1] - times[FIRST_STEPS - 1])


def _our_config(folder: Path) -> Any:
    import flax_transformers as ft
    from flax_transformers.checkpointing.config import CheckpointConfig
    from flax_transformers.data.config import TextData
    from flax_transformers.data.sources.labelled import LabelledSource
    from flax_transformers.data.tokenizers.load import TokenizerConfig
    from flax_transformers.families.bert import BertConfig
    from flax_transformers.models.config import ComputeConfig
    from flax_transformers.objectives.sequence_classification import SequenceClassification
    from flax_transformers.optim.optimizers import AdamW
    from flax_transformers.training.config import Evaluation, Phase, TrainConfig

    return TrainConfig(
        model=BertConfig(
            architecture="BertForSequenceClassification",
            vocab_size=ft.load_tokenizer(folder / "tokenizer").vocabulary.size,
            max_positions=LENGTH,
            num_labels=CLASSES,
            **MODEL,
        ),
        objective=SequenceClassification(),
        data=TextData(
            source=LabelledSource(str(folder / "train.jsonl")),
            validation_source=LabelledSource(str(folder / "held_out.jsonl")),
            tokenizer=TokenizerConfig(path=str(folder / "tokenizer")),
            shards=1,
        ),
        optimizer=AdamW(learning_rate=1e-4),
        phases=(Phase(steps=STEPS, sequence_length=LENGTH, batch_size=BATCH),),
        checkpoints=CheckpointConfig(every_steps=STEPS),
        evaluation=Evaluation(every_steps=0),
        compute=ComputeConfig(dtype="float32"),  # as the other side's
    )


def our_side(folder: Path) -> dict[str, Case]:
    import jax

    import flax_transformers as ft
    from flax_transformers.checkpointing.config import CheckpointConfig
    from flax_transformers.data.dataset import prepare
    from flax_transformers.evaluation.held_out import evaluation_batches
    from flax_transformers.huggingface.family import build_model

    config, runs = _our_config(folder), itertools.count()
    loaded: dict[str, Any] = {}

    class Times(ft.Callback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step(self, step: int, state: Any) -> None:
            jax.block_until_ready(state.step)
            self.times.append(time.perf_counter())

    def read() -> None:
        loaded["base"] = ft.load_pretrained(folder / "bert")
        jax.block_until_ready(loaded["base"][1])

    def write() -> None:
        ft.save_pretrained(folder / f"ours_{next(runs)}", *loaded["base"])

    def fine_tune() -> float:
        times = Times()
        ft.train(config, folder / f"run_{next(runs)}", callbacks=[times])
        return _rate_of_steps(times.times)

    def save_often() -> float:
        phases = (replace(config.phases[0], steps=MANY_STEPS),)
        often = replace(config, phases=phases, checkpoints=CheckpointConfig(every_steps=EVERY))
        ft.train(often, folder / "save_often")
        return 0.0

    def evaluate() -> float:
        if "trainer" not in loaded:
            loaded["data"] = prepare(config.data)
            loaded["trainer"] = ft.Trainer(
                model=build_model(config.model, config.compute),
                objective=config.objective,
                optimizer=config.optimizer.make(STEPS),
            )
            loaded["state"] = loaded["trainer"].init(seed=0)
        batches = evaluation_batches(
            loaded["data"], config.objective, sequence_length=LENGTH, batch_size=BATCH
        )
        started = time.perf_counter()
        loaded["trainer"].evaluate(loaded["state"], batches)
        return HELD_OUT / (time.perf_counter() - started)

    cases = {"read": _folder_case(folder, read), "write": _folder_case(folder, write)}
    return {**cases, "fine-tune": fine_tune, "evaluate": evaluate, SAVE_OFTEN: save_often}


def _their_rows(folder: Path, tokenizer: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    files = {name: str(folder / f"{name}.jsonl") for name in ("train", "held_out")}
    return datasets.load_dataset("json", data_files=files, cache_dir=str(folder / "hf")).map(
        lambda row: {
            **tokenizer(row["text"], truncation=True, max_length=LENGTH),
            "labels": int(row["label"][1:]),
        },
        remove_columns=["text", "label"],
    )


def _their_model(tokenizer: Any) -> Any:
    import transformers

    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(tokenizer),
            max_position_embeddings=LENGTH,
            num_labels=CLASSES,
            num_hidden_layers=MODEL["num_layers"],
            hidden_size=MODEL["hidden_size"],
            num_attention_heads=MODEL["num_heads"],
            intermediate_size=MODEL["intermediate_size"],
        )
    )


def their_side(folder: Path) -> dict[str, Case]:
    import torch
    import transformers

    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    transformers.BertForMaskedLM(transformers.BertConfig()).save_pretrained(folder / "bert")
    rows, model = _their_rows(folder, tokenizer), _their_model(tokenizer)
    loaded, runs = {}, itertools.count()

    class Times(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_: object, **__: object) -> None:
            self.times.append(time.perf_counter())

    def trainer(*callbacks: transformers.TrainerCallback) -> transformers.Trainer:
        return transformers.Trainer(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=str(folder / f"theirs_{next(runs)}"),
                per_device_train_batch_size=BATCH,
                per_device_eval_batch_size=BATCH,
                max_steps=STEPS,
                learning_rate=1e-4,
                save_strategy="no",
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
            ),
            train_dataset=rows["train"],
            eval_dataset=rows["held_out"],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            callbacks=list(callbacks),
        )

    def read() -> None:
        loaded["base"] = transformers.BertForMaskedLM.from_pretrained(folder / "bert")
        # Tensors that are mapped from the file are read when they are used.
        sum(float(value.sum()) for value in loaded["base"].state_dict().values())

    def write() -> None:
        loaded["base"].save_pretrained(folder / f"theirs_{next(runs)}")

    def fine_tune() -> float:
        times = Times()
        trainer(times).train()
        return _rate_of_steps(times.times)

    def evaluate() -> float:
        scoring = trainer()
        started = time.perf_counter()
        scoring.evaluate()
        return HELD_OUT / (time.perf_counter() - started)

    cases = {"read": _folder_case(folder, read), "write": _folder_case(folder, write)}
    return {**cases, "fine-tune": fine_tune, "evaluate": evaluate}


SIDES: dict[str, Callable[[Path], dict[str, Case]]] = {"ours": our_side, "theirs": their_side}


def _table(found: dict[str, dict[str, list[float]]]) -> str:
    """Medians, with the least and the most."""
    lines = ["| case | ours | Transformers | ours / Transformers |", "|---|---|---|---|"]
    for case, sides in found.items():
        files = case in ("read", "write")
        unit, scale = ("GB/s", 1e-9) if files else ("examples/s", 1.0)
        shown = [
            f"{statistics.median(rates) * scale:,.{2 * files}f} {unit} "
            f"({min(rates) * scale:,.{2 * files}f} to {max(rates) * scale:,.{2 * files}f})"
            for rates in (sides["ours"], sides["theirs"])
        ]
        ratio = statistics.median(sides["ours"]) / statistics.median(sides["theirs"])
        lines.append(f"| {case} | {' | '.join(shown)} | {ratio:.2f} |")
    return "\n".join(lines)


def _alone(folder: Path) -> dict[str, str]:
    """Help, and the time of a run by kind."""
    found = {}
    program = [sys.executable, "-m", "flax_transformers"]
    for arguments in (["--help"], ["train", "bert_tiny", "--help"]):
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run([*program, *arguments], check=True, capture_output=True)
            seconds.append(time.perf_counter() - started)
        found[" ".join(arguments)] = f"{statistics.median(seconds):.2f} s"
    rows = map(json.loads, (folder / "save_often" / "metrics.jsonl").read_text().splitlines())
    last = [row for row in rows if "goodput/steps_s" in row][-1]
    spent = {kind: last[f"goodput/{kind}_s"] for kind in ("steps", "data_wait", "checkpoint")}
    each = {"steps": MANY_STEPS, "data_wait": MANY_STEPS, "checkpoint": MANY_STEPS // EVERY}
    names = {"steps": "a step", "data_wait": "waiting for a batch", "checkpoint": "saving"}
    for kind, name in names.items():
        found[name] = f"{spent[kind] / each[kind] * 1e3:,.2f} ms"
    return found


if __name__ == "__main__":
    main()
