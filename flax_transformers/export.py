"""Runs in Hugging Face format: the files beside the weights, and exports while a run trains."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from etils import epath

from flax_transformers import model_card
from flax_transformers.adapters.lora import merged
from flax_transformers.checkpointing.step_directories import SavedStep, write_files
from flax_transformers.config_json import to_json
from flax_transformers.data.images.dataset import ImageData
from flax_transformers.data.tokenizers.export import export_folder, warn_of_another_class
from flax_transformers.data.tokenizers.load import load_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import (
    build_model,
    config_json,
    family_of,
    within_vocabulary,
)
from flax_transformers.huggingface.folder_kinds import CONFIG
from flax_transformers.huggingface.write import files_to_carry, save_directory
from flax_transformers.models.config import (
    TextConfig,
    TransformerConfig,
    VisionConfig,
)
from flax_transformers.objectives.images import PixelInput
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.pretrained import (
    describe_pretrained,
    find_pretrained,
    load_pretrained,
    with_image_size,
)
from flax_transformers.restore import saved_part, with_prompts
from flax_transformers.storage.hub import require_name, upload
from flax_transformers.storage.paths import is_bucket
from flax_transformers.training.callbacks import Callback
from flax_transformers.training.config import AnyPhase, TrainConfig
from flax_transformers.training.state import TrainState

log = logging.getLogger(__name__)

PREPROCESSOR = "preprocessor_config.json"
TOKENIZER = "tokenizer_config.json"
_BICUBIC = 3
"""Pillow's index of the bicubic filter, with which this package resizes images."""


def run_files(
    run: SavedStep, model: TransformerConfig, tokenizer: Path | None
) -> dict[str, dict[str, Any]]:
    """JSON files by name, to be exported with the weights of a checkpoint.

    ``tokenizer`` is the folder of its tokenizer. Of the run's config only ``data`` and
    ``objective`` of a vision model are read; if that fails, a warning is logged.
    """
    data = objective = None
    if model.image_encoder is not None:
        try:
            data, objective = saved_part(run, "data"), saved_part(run, "objective")
        except UserError as error:
            log.warning("%s is not written: %s", PREPROCESSOR, error)
    return files_beside(data, objective, model, tokenizer)


def files_beside(
    data: Any, objective: Any, model: TransformerConfig, tokenizer: Path | None
) -> dict[str, dict[str, Any]]:
    """JSON files by name, to be exported with a model that was trained on ``data`` with an
    ``objective``; ``tokenizer`` is the folder of its tokenizer."""
    return _image_files(data, objective, model) | _text_files(model, tokenizer)


def _image_files(data: Any, objective: Any, model: TransformerConfig) -> dict[str, dict[str, Any]]:
    encoder = model.image_encoder
    if not (encoder and isinstance(data, ImageData) and isinstance(objective, PixelInput)):
        return {}
    described = preprocessor(data, objective, encoder)
    family = family_of(model)
    if not family.timm_prefix:
        return {PREPROCESSOR: described}
    cfg = family.to_huggingface(model)["pretrained_cfg"] | {  # timm reads no other file
        "mean": described["image_mean"],
        "std": described["image_std"],
        "crop_pct": data.crop_fraction,
    }
    return {PREPROCESSOR: described, CONFIG: {"pretrained_cfg": cfg}}


def as_seen_last(
    model: Any, params: Any, data: Any, objective: Any, phases: Sequence[AnyPhase]
) -> tuple[Any, Any]:
    """The model of a run and its parameters, with positions for the images of the last phase, for
    which training interpolates them."""
    encoder, trained = model.config.image_encoder, objective
    if not (encoder and isinstance(data, ImageData) and isinstance(objective, PixelInput)):
        return model, params
    spec = trained.window_spec(phases[-1].sequence_length)
    side = getattr(spec, "image_size", spec.length)  # of pairs, the length is that of texts
    if encoder.image_shape == (side, side):
        return model, params
    return with_image_size(model, nn.meta.unbox(params), side)


def _text_files(model: TransformerConfig, tokenizer: Path | None) -> dict[str, dict[str, Any]]:
    file = None if tokenizer is None else tokenizer / TOKENIZER
    limit = model.max_positions if isinstance(model, TextConfig) else None
    if file is None or limit is None or not file.is_file():
        return {}
    return {TOKENIZER: {"model_max_length": limit, **json.loads(file.read_text("utf-8"))}}


def preprocessor(data: ImageData, pixels: PixelInput, model: VisionConfig) -> dict[str, Any]:
    """A preprocessor_config.json with the preprocessing of evaluation: a centre crop of
    ``data.crop_fraction`` of the shorter side, resized, scaled to [0, 1] and normalised."""
    height, width = model.image_shape
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": model.num_channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": round(min(height, width) / data.crop_fraction)},
        "resample": _BICUBIC,
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": _of_each(pixels.mean, model.num_channels),
        "image_std": _of_each(pixels.std, model.num_channels),
    }


def _of_each(values: tuple[float, ...], channels: int) -> list[float]:
    return list(values) * channels if len(values) == 1 else list(values)


def with_ids_of(model: Any, tokenizer: Path | None) -> Any:
    """The model with start and end ids of its tokenizer, if its config has none that are valid."""
    config: Any = within_vocabulary(model.config)
    if tokenizer is None or not tokenizer.is_dir() or config == model.config:
        return model
    vocabulary = load_tokenizer(tokenizer).vocabulary
    changes: dict[str, Any] = {}
    if config.bos_id is None and config.bos_id != model.config.bos_id:
        changes["bos_id"] = vocabulary.bos_id
    if not config.eos_ids and vocabulary.end_id is not None:
        changes["eos_ids"] = (vocabulary.end_id,)
    return build_model(replace(config, **changes), model.compute)


def as_transformers_reads_it(
    tokenizer: Any, config: Any, scratch: Path, objective: object
) -> Path | None:
    """The folder to export for a checkpoint's tokenizer; None if it has none."""
    if tokenizer is None or not Path(tokenizer).is_dir():
        return None
    limit, types = getattr(config, "max_positions", None), getattr(config, "token_types", 0)
    return export_folder(Path(tokenizer), scratch / "exported", limit, types, objective)


def write_run(
    directory: Path, model: Any, params: Any, found: SavedStep, averaged: Sequence[int] = ()
) -> tuple[Any, Any, list[str]]:
    """Writes the model of a checkpoint to a new directory in Hugging Face format.

    ``averaged``: the steps that ``params`` are the average of, if they are not those of ``found``.
    Returns the written model and its parameters, which are for images of the size of the run's last
    phase, and the names of the files beside its config and weights. A run whose targets have
    their own tokenizer is written without tokenizers, as one of them alone would encode one side
    wrongly.
    """
    describe = partial(run_files, found) if "config" in found.meta else None
    with tempfile.TemporaryDirectory() as scratch:
        folder = found.folder
        if is_bucket(folder):
            names = [name for name in ("tokenizer", "target_tokenizer") if (folder / name).is_dir()]
            write_files(epath.Path(scratch), {name: folder / name for name in names})
            folder = epath.Path(scratch)
        objective = None
        with suppress(UserError):  # a type that is not registered here
            objective = saved_part(found, "objective")
            if model.config.image_encoder is not None:
                data, phases = (saved_part(found, name) for name in ("data", "phases"))
                model, params = as_seen_last(model, params, data, objective, phases)
        card = partial(model_card.model_card, meta=found.meta, averaged=averaged)
        _warn_of_prompts(model.config)
        written = _write(directory, model, params, Path(folder), card, describe, objective)
        return written[0], params, written[1]


def _warn_of_prompts(config: Any) -> None:
    """Warns of a model that transformers reads prompts with in another way than its training."""
    if isinstance(config, TextConfig) and config.generation.bidirectional_prompt:
        log.warning(
            "the run attends to prefixes both ways, but its class in transformers reads prompts "
            "causally: texts that transformers generates are worse"
        )


def _write(
    directory: Path, model: Any, params: Any, folder: Path, card: Callable[[Any], str],
    describe: Any, objective: object,
) -> tuple[Any, list[str]]:  # fmt: skip
    """``write_run``, with the tokenizers in ``folder``. ``describe``: the files beside a trained
    model, by its config and the folder of its tokenizer; ``card``: its model card, by its config;
    ``objective``: that of the run, None if it is unknown."""
    tokenizer = None if (folder / "target_tokenizer").is_dir() else folder / "tokenizer"
    files: dict[str, dict[str, Any] | str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = model if describe is None else with_ids_of(model, tokenizer)
        beside = as_transformers_reads_it(tokenizer, model.config, Path(scratch), objective)
        config = model.config
        warn_of_another_class(beside, family_of(config).model_type(config.architecture))
        if describe is not None:
            files |= describe(model.config, beside)
            files[model_card.FILE] = card(model.config)
        added = [name for name in files if name != CONFIG]
        names = list(dict.fromkeys([*files_to_carry(beside, model.config), *added]))
        save_directory(directory, model, params, tokenizer_from=beside, files=files)
    return model, names


def push_to_hub(
    path: str | os.PathLike[str],
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload by flax_transformers",
) -> str:
    """Uploads a model to the repository ``name`` (OWNER/NAME) of the Hugging Face hub; its URL.

    ``path`` is a folder in Hugging Face format, or a run or checkpoint, which is converted to one
    first. A folder without a README.md gets a model card. The repository is made if there is none,
    ``private`` or public. ``revision``: the branch to commit to, by default main. The token is that
    of ``hf auth login`` or HF_TOKEN. Raises UserError for what cannot be read, and if the hub
    refuses.
    """
    require_name(name)
    found = find_pretrained(path)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        if isinstance(found, SavedStep):
            model, params = load_pretrained(found)
            write_run(folder, model, params, found)
        else:
            folder = found
            if not (folder / model_card.FILE).exists() and (folder / CONFIG).exists():
                shutil.copytree(found.absolute(), folder := Path(scratch) / "model",
                                copy_function=os.symlink)  # fmt: skip
                card = model_card.model_card(describe_pretrained(found))
                (folder / model_card.FILE).write_text(card, "utf-8")
        return upload(folder, name, private=private, revision=revision, message=message)


class Exporter(Callback):
    """Writes the model in Hugging Face format to exports/STEP of the workdir while it is trained.

    It is written every ``checkpoints.export_every`` steps and after the last step of the config;
    ``convert`` writes that of a run which ends early. They are the parameters that are evaluated,
    in float32. A folder appears when it is complete, and the newest
    ``checkpoints.keep_exports`` are kept. What cannot be written is a warning.
    ``tokenizer_files``: those of a checkpoint, by path.

    Raises UserError, before training, for a model that transformers has no class for, a workdir in
    a bucket, and a job of several processes.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        workdir: epath.Path,
        tokenizer_files: Mapping[str, bytes],
    ) -> None:
        option = "checkpoints.export_every"
        if jax.process_count() > 1:
            raise UserError(f"{option} is for jobs of one process; use convert afterwards")
        if is_bucket(workdir):
            raise UserError(f"{option} writes to local folders, and {workdir} is none; use convert")
        config_json(within_vocabulary(config.model))
        described = with_prompts(config.model, config.objective)
        _warn_of_prompts(described)
        self._config, self._model = config, model.clone(config=described)
        self._folder, self._tokenizer_files = Path(os.fspath(workdir)) / "exports", tokenizer_files
        self._merge = jax.jit(lambda params: merged(params, config.lora.scale))

    def on_train_begin(self, step: int, total_steps: int) -> None:
        with suppress(OSError):  # the export says what is wrong
            self._recover()

    def on_step(self, step: int, state: TrainState) -> None:
        every = self._config.checkpoints.export_every
        if every is None or (step % every and step != self._config.total_steps):
            return
        with watchdog.phase("save"):
            params = state.evaluation_params
            try:
                self._write(step, self._merge(params) if self._config.lora.is_on else params)
            except (UserError, OSError) as error:
                log.warning("step %d is not exported: %s", step, error)

    def _write(self, step: int, params: Any) -> None:
        self._recover()
        target, config = self._folder / str(step), self._config
        with tempfile.TemporaryDirectory() as scratch:
            for name, content in self._tokenizer_files.items():
                file = Path(scratch) / name
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(content)
            new, old = (self._folder / f".{step}.{name}" for name in ("new", "old"))
            meta = {"config": to_json(config), "position": {"step": step}}
            describe = partial(files_beside, config.data, config.objective)
            card = partial(model_card.model_card, meta=meta)
            seen = as_seen_last(self._model, params, config.data, config.objective, config.phases)
            _write(new, *seen, Path(scratch), card, describe, config.objective)
        if target.exists():  # of the same step, before the run was resumed or rolled back
            target.rename(old)
        new.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        self._remove_others(step)

    def _recover(self) -> None:
        """Remove what a killed process left, except the only copy of an export, which is complete.

        A process that is killed while it replaces one leaves both copies; the new one is kept.
        """
        for folder in (*self._folder.glob(".[0-9]*.new"), *self._folder.glob(".[0-9]*.old")):
            target = folder.with_name(folder.name[1:-4])
            if target.name.isdecimal() and not target.exists():
                folder.rename(target)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        for folder in self._folder.glob("..[0-9]*.new.*.tmp"):  # what ``save_directory`` writes to
            shutil.rmtree(folder, ignore_errors=True)

    def _remove_others(self, newest: int) -> None:
        """Keep the newest exports. Later ones are of a run that went further before it returned to
        a checkpoint."""
        steps = sorted(int(one.name) for one in self._folder.iterdir() if one.name.isdecimal())
        known = [step for step in steps if step <= newest]
        for step in (*steps[len(known) :], *known[: -self._config.checkpoints.keep_exports]):
            shutil.rmtree(self._folder / str(step), ignore_errors=True)
