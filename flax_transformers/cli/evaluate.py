"""Score a checkpoint on the held-out text of its config, or of another."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from etils import epath

from flax_transformers.cli.shared_arguments import MODEL_HELP, add_architecture
from flax_transformers.errors import UserError

if TYPE_CHECKING:  # the command line answers --help without waiting for jax
    from flax_transformers.data.dataset import Dataset
    from flax_transformers.training.config import TrainConfig
    from flax_transformers.training.loop import Snapshot
    from flax_transformers.training.restore import Restored


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help=MODEL_HELP)
    parser.add_argument(
        "--config",
        help="whose data and objective to score with (default: the run's own; a Hugging Face "
        "directory has none)",
    )
    add_architecture(parser, "CKPT", "BertForMaskedLM")
    parser.add_argument("--output", help="also write the JSON to this file")
    parser.epilog = (
        "Any field of the config can be set, as in --evaluation.batch-size 64; --mesh.fsdp -1 "
        "--mesh.data 1 divides a model that one device does not hold."
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from flax_transformers import runtime
    from flax_transformers.checkpointing.manager import find_checkpoint
    from flax_transformers.cli.config_file import config_of_run, load_config, override
    from flax_transformers.evaluation.tasks import baselines, evaluators
    from flax_transformers.parallel.mesh import MeshConfig, make_mesh
    from flax_transformers.parallel.watchdog import watchdog
    from flax_transformers.pretrained import is_checkpoint
    from flax_transformers.storage.workdir import write_text
    from flax_transformers.training.check_run import check_config, check_run

    runtime.start(None)
    config = load_config(arguments.config) if arguments.config else None
    if config is None and is_checkpoint(arguments.checkpoint):
        config = config_of_run(find_checkpoint(arguments.checkpoint))
    if config is None:
        raise UserError(
            f"{arguments.checkpoint} belongs to no run; give --config CONFIG, whose data it is to "
            "be scored on"
        )
    # The devices that are here are not those it was trained on: their mesh is the caller's choice.
    config = override(dataclasses.replace(config, mesh=MeshConfig()), overrides)
    restored = runtime.restored_model(
        arguments.checkpoint, make_mesh(config.mesh), config.compute, arguments.architecture
    )
    _check_length(config, restored)
    config = dataclasses.replace(config, model=restored.model_config, phases=config.phases[-1:])
    check_config(config, trains=False)
    trained_with = {"tokenizer": restored.tokenizer, "target_tokenizer": restored.target_tokenizer}
    prepared = runtime.prepared_data(
        config.data, {name: one for name, one in trained_with.items() if one is not None}
    )
    prepared = runtime.fitted_data(config, prepared)
    _check_data(config, prepared, restored, arguments.checkpoint)
    check_run(config, prepared, new=False)
    snapshot = _snapshot(config, restored)
    result: dict[str, float] = {"step": restored.step}
    watchdog.start(config.limits)
    with jax.set_mesh(restored.mesh), watchdog.phase("evaluation"):
        for evaluator in evaluators(config, prepared, restored.model, workdir=None):
            result |= evaluator(snapshot)
    for baseline in baselines(config, prepared):
        result[baseline.key] = baseline.score
    text = json.dumps(result, indent=2)
    if jax.process_index() == 0:
        print(text)
        if arguments.output:
            write_text(epath.Path(arguments.output), text + "\n")
    return 0


def _check_length(config: TrainConfig, restored: Restored) -> None:
    length = config.phases[-1].sequence_length
    limit = getattr(restored.model_config, "max_positions", None)
    if limit is not None and length > limit:
        raise UserError(
            f"the last phase has sequence_length {length}, the checkpoint's model takes {limit}; "
            f"set --phases.{len(config.phases) - 1}.sequence-length {limit}"
        )


def _check_data(
    config: TrainConfig, prepared: Dataset, restored: Restored, checkpoint: str
) -> None:
    from flax_transformers.pretrained import is_checkpoint

    spec = config.objective.window_spec(config.phases[-1].sequence_length)
    if prepared.examples("validation", spec) is None:
        raise UserError(
            f"the data in {prepared.directory} holds nothing out to score on; set "
            "--data.validation-fraction, or a validation_source in the config"
        )
    for name in ("tokenizer", "target_tokenizer"):
        theirs, ours = (
            tokenizer and tokenizer.fingerprint
            for tokenizer in (getattr(prepared, name), getattr(restored, name))
        )
        if theirs != ours:
            words, option = name.replace("_", " "), name.replace("_", "-")
            place = f"{checkpoint}/{name}" if is_checkpoint(checkpoint) else checkpoint
            raise UserError(
                f"the data in {prepared.directory} has another {words} than the checkpoint; set "
                f"--data.{option}.path to {place}"
            )


def _snapshot(config: TrainConfig, restored: Restored) -> Snapshot:
    """The checkpoint as evaluators see a run."""
    import jax

    from flax_transformers.training.loop import Snapshot
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
