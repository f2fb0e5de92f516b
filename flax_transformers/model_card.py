"""Model cards: README.md of a folder in Hugging Face format, as its hub shows it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax_transformers.checkpointing.step_directories import named_step, was_evaluated
from flax_transformers.huggingface.family import build_model, family_of
from flax_transformers.huggingface.write import published_parameters
from flax_transformers.models.config import TransformerConfig
from flax_transformers.version import __version__

FILE = "README.md"
_TASKS = {  # the ends of names of architectures, pipelines of the hub, and classes of transformers
    "ForMaskedLM": ("fill-mask", "AutoModelForMaskedLM"),
    "ForPreTraining": (None, "AutoModelForPreTraining"),
    "ForCausalLM": ("text-generation", "AutoModelForCausalLM"),
    "LMHeadModel": ("text-generation", "AutoModelForCausalLM"),
    "EncoderModel": (None, "AutoModelForTextEncoding"),
    "MTModel": ("translation", "AutoModelForSeq2SeqLM"),
    "ForConditionalGeneration": (None, "AutoModelForSeq2SeqLM"),
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
    "ForQuestionAnswering": ("question-answering", "AutoModelForQuestionAnswering"),
    "ForImageClassification": ("image-classification", "AutoModelForImageClassification"),
    "ForImageClassificationWithTeacher": (
        "image-classification",
        "AutoModelForImageClassification",
    ),
    "ForVideoClassification": ("video-classification", "AutoModelForVideoClassification"),
    "ForNextSentencePrediction": (None, "AutoModelForNextSentencePrediction"),
    "ForMultipleChoice": ("multiple-choice", "AutoModelForMultipleChoice"),
}


def model_card(
    config: TransformerConfig,
    meta: Mapping[str, Any] | None = None,
    averaged: Sequence[int] = (),
) -> str:
    """The text of a card: what the model is, how it was trained and scored, and how to load it.

    ``meta``: that of a run's checkpoint, with its config, step and metrics. ``averaged``: the steps
    of the run whose weights the model is the average of.
    """
    family = family_of(config)
    model = build_model(config)
    pipeline, auto = hub_task(config.architecture)
    there = config.architecture not in family.only_here and not family.timm_prefix
    library = "timm" if family.timm_prefix else "transformers" if there else "flax_transformers"
    head = [
        "---",
        f"library_name: {library}",
        *([f"pipeline_tag: {pipeline}"] if pipeline else []),
        "tags: [flax_transformers, jax, flax]",
        "---",
    ]
    about = (
        f"`{config.architecture}` with {published_parameters(model):,} parameters: "
        f"{config.num_layers} layers, {config.hidden_size} wide, {config.num_heads} heads. Written "
        f"by flax_transformers {__version__}."
    )
    run = _training(meta, averaged) if meta and isinstance(meta.get("config"), Mapping) else []
    loading = _loading(auto if there else None)
    return "\n".join([*head, "", f"# {config.architecture}", "", about, "", *run, *loading]) + "\n"


def hub_task(architecture: str) -> tuple[str | None, str]:
    """The pipeline of the hub for an architecture, if there is one, and transformers' class."""
    if architecture.endswith("WithProjection"):  # AutoModel would leave the projection out
        return None, architecture
    ending = next((end for end in _TASKS if architecture.endswith(end)), None)
    return _TASKS[ending] if ending else (None, "AutoModel")


def _training(meta: Mapping[str, Any], averaged: Sequence[int]) -> list[str]:
    run = meta["config"]
    phases = [
        f"{phase.get('steps')} steps x {phase.get('batch_size')}"
        + (f" x {phase['sequence_length']} tokens" if "sequence_length" in phase else "")
        for phase in run.get("phases", ())
    ]
    optimizer = run.get("optimizer") or {}
    rows = {
        "objective": _described(run.get("objective")),
        "data": _source(run.get("data") or {}),
        "phases": ", then ".join(phases),
        "optimizer": _described(optimizer, without=("schedule",)),
        "schedule": _described(optimizer.get("schedule")),
        "seed": run.get("seed"),
        "step": named_step(meta) if not averaged else None,
        "average of the steps": ", ".join(map(str, averaged)),
        "started from": _name_of(run["init_from"]) if run.get("init_from") else None,
    }
    table = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    metrics = (meta.get("metrics") or {}) if was_evaluated(meta) and not averaged else {}
    scores = {
        name: value
        for name, value in sorted(metrics.items())
        if name.startswith("eval/") and isinstance(value, int | float)
    }
    lines = ["## Training", "", "| | |", "|---|---|", *table, ""]
    if scores:
        lines += ["## Held-out scores", "", "| metric | value |", "|---|---:|"]
        lines += [f"| `{name}` | {value:.6g} |" for name, value in scores.items()]
        lines.append("")
    return lines


def _described(part: Any, without: tuple[str, ...] = ()) -> str:
    """The type and the plain fields of a part of a saved config."""
    if not isinstance(part, Mapping):
        return ""
    fields = [
        f"{name} {_name_of(value) if isinstance(value, str) else value}".replace("|", "\\|")
        for name, value in part.items()
        if name not in ("type", *without) and isinstance(value, int | float | str) and value != ""
    ]
    return f"`{part.get('type')}`" + (f": {', '.join(fields)}" if fields else "")


def _source(data: Mapping[str, Any]) -> str:
    """What a run was trained on, without the folders of the machine that it was on."""
    if parts := data.get("components"):
        return ", ".join(f"{part.get('name')}: {_source(part)}" for part in parts)
    path = (data.get("source") or {}).get("path")
    return f"`{_name_of(path)}`" if isinstance(path, str) else f"`{data.get('type')}`"


def _name_of(path: str) -> str:
    local = os.path.isabs(os.path.expanduser(path)) or Path(path).exists()
    return os.path.basename(path.rstrip("/")) if local else path


def _loading(auto: str | None) -> list[str]:
    code = [
        "import flax_transformers as ft",
        "",
        'model, params = ft.load_pretrained("FOLDER_OR_ID")',
    ]
    if auto is not None:
        code = [
            f"from transformers import {auto}",
            "",
            f'model = {auto}.from_pretrained("FOLDER_OR_ID")',
            "```",
            "",
            "```python",
            *code,
        ]
    return ["## Load it", "", "```python", *code, "```"]
