"""``flax-transformers evaluate``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction

from flax_transformers.cli.parsing import Architecture, Model, option, override
from flax_transformers.errors import UserError
from flax_transformers.parallel.watchdog import watchdog

if TYPE_CHECKING:
    from flax_transformers.checkpointing.step_directories import SavedStep
    from flax_transformers.data.dataset import Dataset
    from flax_transformers.evaluation.class_report import ClassReport
    from flax_transformers.models.config import TransformerConfig
    from flax_transformers.restore import RestoredModel
    from flax_transformers.runtime import StoredModel
    from flax_transformers.training.callbacks import Snapshot
    from flax_transformers.training.config import TrainConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluate:
    """Score a model on the held-out data of its config, or of another.

    For classes and tags, precision, recall and F1 of each are printed too, with the confusion
    matrix as text and PNG. A table compares the scores on evaluation sets.

    Any field of the config can be set, as in --evaluation.batch-size 64; of the model only its
    generation settings, as in --model.generation.num-beams 4. --mesh.fsdp -1 --mesh.data 1 shards a
    model that does not fit on one device.
    """

    model: Model
    config: Annotated[str | None, option("CONFIG")] = None
    """Config whose data and objective to score with (default: that of the run; a Hugging Face
    directory has none)."""
    architecture: Architecture = None
    sets: Annotated[UseAppendAction[tuple[str, ...]], option("NAME=PATH")] = ()
    """Also score these files, of the same kind as the training data, as eval/NAME/...; added to the
    evaluation.sets of the config. Can be given several times."""
    output: Annotated[str | None, option("FILE")] = None
    """Also write the JSON to this file. The report of classes and the confusion matrix are written
    beside it, without it to evaluation/ in the workdir."""

    def run(self, overrides: Sequence[str]) -> int:
        import jax
        from etils import epath

        from flax_transformers.monitoring.metrics import json_text
        from flax_transformers.storage.workdir import write_text

        text = json_text(self._scores(overrides), indent=2)
        if jax.process_index() == 0:
            print(text)
            if self.output:
                write_text(epath.Path(self.output).expanduser(), text + "\n")
        return 0

    def _scores(self, overrides: Sequence[str]) -> dict[str, float]:
        import jax

        from flax_transformers import pretrained, runtime
        from flax_transformers.evaluation.report import table_of_sets
        from flax_transformers.evaluation.tasks import baselines, evaluators
        from flax_transformers.parallel.mesh import make_mesh
        from flax_transformers.training.check_run import check_config, check_run

        runtime.start(None)
        config = _with_sets(self._config(overrides), self.sets)
        watchdog.start(config.limits)
        mesh = make_mesh(config.mesh)
        with watchdog.phase("restore"):
            stored = runtime.stored_model(self.model, self.architecture)
        given, place = runtime.given_fields(overrides), stored.place
        model = pretrained.evaluated_model(stored.model, config.model, given, place)
        stored = replace(stored, model=model)
        _check_length(config, model)
        config = replace(config, model=model, phases=config.phases[-1:])
        check_config(config, trains=False)
        with watchdog.phase("prepare"):
            names = "tokenizer", "target_tokenizer"
            of_run = {name: one for name in names if (one := getattr(stored, name)) is not None}
            prepared = runtime.prepared_data(config.data, of_run, stored.trained_on)
            prepared = runtime.fitted_data(config, prepared)
            _check_data(config, prepared, stored, place)
            check_run(config, prepared, new=False)
            prepared = runtime.completed_data(config, prepared)
            sets = runtime.evaluation_sets(config, prepared)
        with watchdog.phase("restore"):
            restored = runtime.restored_model(stored, mesh, config.compute)
        config = replace(config, model=restored.model_config)
        snapshot = _snapshot(config, restored)
        result: dict[str, float] = {"step": restored.step}
        with jax.set_mesh(restored.mesh), watchdog.phase("evaluation"):
            report = self._report(stored, restored.step)
            for evaluator in evaluators(config, prepared, restored.model, None, report, sets):
                result |= evaluator(snapshot)
            guesses = baselines(config, prepared, sets)
        if sets and jax.process_index() == 0:
            log.info(
                "evaluation sets:\n%s\n", table_of_sets(result, [name for name, _ in sets], guesses)
            )
        return result | {baseline.key: baseline.score for baseline in guesses}

    def _report(self, stored: StoredModel, step: int) -> ClassReport:
        """Beside --output, else in the workdir of a run; only printed for other models."""
        from etils import epath

        from flax_transformers.checkpointing.step_directories import SavedStep
        from flax_transformers.evaluation.class_report import ClassReport

        if self.output:
            return ClassReport(epath.Path(self.output).expanduser().with_suffix(""))
        source = stored.source
        if isinstance(source, SavedStep) and source.folder.parent.name == "checkpoints":
            workdir = source.folder.parent.parent
            return ClassReport(workdir / "evaluation" / f"step_{step:08d}")
        return ClassReport()

    def _config(self, overrides: Sequence[str]) -> TrainConfig:
        from flax_transformers.checkpointing.manager import find_checkpoint
        from flax_transformers.cli.config_file import load_config
        from flax_transformers.parallel.mesh import MeshConfig
        from flax_transformers.pretrained import is_checkpoint
        from flax_transformers.restore import saved_config

        config = load_config(self.config) if self.config else None
        if is_checkpoint(self.model):
            found = find_checkpoint(self.model)
            if config is None:
                config = saved_config(found)
            else:
                _log_other_values(config, found, self.config)
        if config is None:
            raise UserError(
                f"{self.model} is no run here; check the path, or give --config CONFIG, on "
                "whose data to score it"
            )
        # Not the mesh of the run: other devices may be present here.
        return override(replace(config, mesh=MeshConfig()), overrides)


def _log_other_values(config: TrainConfig, found: SavedStep, file: str | None) -> None:
    """Logs where the config of a ``file`` scores otherwise than that of the run."""
    from flax_transformers.config_json import to_json
    from flax_transformers.restore import saved_config
    from flax_transformers.training.config import differences

    try:
        of_run = saved_config(found)
    except UserError:  # a type that is not known here, which the file replaces
        of_run = None
    if of_run is None:
        return
    saved, own = (
        to_json([one.data, one.objective, one.evaluation, one.phases[-1].sequence_length])
        for one in (of_run, config)
    )
    names = "data", "objective", "evaluation", "phases.sequence_length"
    shown = [
        f"{field} {new!r} (run: {old!r})"
        for name, before, after in zip(names, saved, own, strict=True)
        for field, (old, new) in differences(*_alike(before, after), name).items()
    ]
    if shown:
        log.info(
            "scoring with the values of %s, not with those of the run: %s%s",
            file,
            ", ".join(shown[:4]),
            f" and {len(shown) - 4} more" if len(shown) > 4 else "",
        )


def _alike(old: Any, new: Any) -> tuple[Any, Any]:
    """Two JSON configs; of each that is of another type than the other only the type, since fields
    that one of them lacks say nothing."""
    if isinstance(old, dict) and isinstance(new, dict) and old.get("type") != new.get("type"):
        return {"type": old.get("type")}, {"type": new.get("type")}
    return old, new


def _with_sets(config: TrainConfig, sets: Sequence[str]) -> TrainConfig:
    """``config`` with an evaluation set for each ``NAME=PATH``: the source of its training data, or
    of the first component of a mixture, at another path."""
    from flax_transformers.data.base import EvaluationSet

    if not sets:
        return config
    first = getattr(config.data, "components", (config.data,))[0]
    source = getattr(first, "source", None)
    found = []
    for text in sets:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise UserError(f"--sets is {text!r}; give a name and a path, as in cs=cs_test.conllu")
        if source is None:
            raise UserError(f"--sets {text}: a {type(config.data).__name__} reads no files")
        found.append(EvaluationSet(name, _at(source, path)))
    own = config.evaluation
    return replace(config, evaluation=replace(own, sets=(*own.sets, *found)))


def _at(source: Any, path: str) -> Any:
    """``source`` at another path, of which the split of the training data says nothing."""
    from flax_transformers.data.sources.corpus_files import ending
    from flax_transformers.data.sources.records import Source

    if getattr(source, "target_path", None) is not None:
        raise UserError(
            f"--sets names one file, {path}, but the training data is two files of sources and "
            "targets; write both into one tsv or jsonl file, or add EvaluationSet(NAME, "
            "PairSource(PATH, target_path=TARGETS)) to evaluation.sets of the config"
        )
    in_files = isinstance(source, Source) and not path.startswith("tfds:")
    if in_files and not ending(Path(path), (".json",)):
        source = replace(source, split=type(source).split)
    return replace(source, path=path)


def _check_length(config: TrainConfig, model: TransformerConfig) -> None:
    length, limit = config.phases[-1].sequence_length, model.length_limit
    if limit is not None and length > limit:
        raise UserError(
            f"the last phase has sequence_length {length}, but the model takes {limit}; "
            f"set --phases.{len(config.phases) - 1}.sequence-length {limit}"
        )


def _check_data(
    config: TrainConfig, prepared: Dataset, stored: StoredModel, checkpoint: str
) -> None:
    from flax_transformers.pretrained import is_checkpoint

    spec = config.objective.window_spec(config.phases[-1].sequence_length)
    if prepared.examples("validation", spec) is None and not config.evaluation.sets:
        raise UserError(
            f"the data in {prepared.directory} has no held-out examples; set "
            "--data.validation-fraction, a validation_source in the config, or --sets NAME=PATH"
        )
    for name in ("tokenizer", "target_tokenizer"):
        theirs, ours = (
            tokenizer and tokenizer.fingerprint
            for tokenizer in (getattr(prepared, name), getattr(stored, name))
        )
        if theirs != ours:
            shown, option = name.replace("_", " "), name.replace("_", "-")
            folder = f"{checkpoint}/{name}" if is_checkpoint(checkpoint) else checkpoint
            raise UserError(
                f"the data in {prepared.directory} has another {shown} than the checkpoint; "
                f"set --data.{option}.path to {folder}"
            )


def _snapshot(config: TrainConfig, restored: RestoredModel) -> Snapshot:
    """The model as evaluators receive a run."""
    import jax

    from flax_transformers.training.callbacks import Snapshot
    from flax_transformers.training.step import (
        compile_evaluation_step,
        make_evaluation_step,
        model_functions,
    )

    functions = model_functions(restored.model)
    with jax.set_mesh(restored.mesh):
        step = compile_evaluation_step(
            make_evaluation_step(config.objective, functions), restored.params, restored.mesh
        )
    return Snapshot(
        restored.step, restored.params, config.phases[-1], restored.mesh, functions, step
    )
