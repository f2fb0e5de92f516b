"""Convert a model: a Hugging Face directory to a checkpoint of ours, or the other way round."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flax_transformers.cli.shared_arguments import MODEL_HELP, add_architecture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SRC",
        help=MODEL_HELP,
    )
    parser.add_argument("target", metavar="DST", help="a new folder for the other kind")
    add_architecture(parser, "SRC", "BertModel")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the tensors in a Hugging Face directory (default float32, as ours always are)",
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax
    from etils import epath

    from flax_transformers.cli import comparison, runtime
    from flax_transformers.cli.config_file import refuse
    from flax_transformers.cli.run_files import run_files, with_ids_of
    from flax_transformers.errors import UserError
    from flax_transformers.families import hub_read, hub_write, side_files
    from flax_transformers.families.family import family_of
    from flax_transformers.pretrained import is_checkpoint, load_pretrained
    from flax_transformers.training.buckets import is_bucket
    from flax_transformers.training.checkpoints import find_checkpoint
    from flax_transformers.training.restore import saved_config
    from flax_transformers.training.step_folders import write_files

    refuse(overrides)
    if "://" in arguments.target:
        raise UserError(
            f"{arguments.target} is no folder of this machine; convert into one, then copy"
        )
    source, target = arguments.source, Path(arguments.target).expanduser().absolute()
    hub_write.require_new(target)
    from_ours = is_checkpoint(source)
    if arguments.dtype and not from_ours:
        raise UserError(
            f"{source} becomes a checkpoint of ours, which is float32; leave out --dtype"
        )
    runtime.start(None)
    model: Any
    model, params = load_pretrained(
        source, architecture=arguments.architecture, dtype=arguments.dtype or "float32"
    )
    folder = find_checkpoint(source).folder if from_ours else Path(source)
    # Of two tokenizers, one alone would write the target side wrongly.
    two_tokenizers = from_ours and (folder / "target_tokenizer").is_dir()
    if from_ours:
        published = target
        with tempfile.TemporaryDirectory() as scratch:
            beside = None if two_tokenizers else folder / "tokenizer"
            if beside is not None and is_bucket(beside):
                write_files(epath.Path(scratch), {"tokenizer": beside})
                beside = epath.Path(scratch) / "tokenizer"
            trained = saved_config(find_checkpoint(source))
            if trained is not None:
                model = with_ids_of(model, None if beside is None else Path(beside))
            beside = _as_transformers_reads_it(beside, model.config, Path(scratch))
            files = {} if trained is None else run_files(trained, model.config, beside)
            carried = dict(side_files.carried_files(beside))
            carried |= dict.fromkeys(files, target)
            hub_write.save_directory(target, model, params, tokenizer_from=beside, files=files)
    else:
        published = hub_read.find_directory(source) or Path(source)
        carried = side_files.carried_files(published)
        _write_checkpoint(target, model, params, published)
    for label, value in (
        ("family", family_of(model.config).model_types[0]),
        ("architecture", model.config.architecture),
        ("parameters", f"{hub_write.published_parameters(model):,}"),
        ("dtype", str(jax.tree.leaves(params)[0].dtype)),
        (
            "carried along",
            _two_tokenizers(folder)
            if two_tokenizers
            else ", ".join(carried) or "nothing: no tokenizer to carry",
        ),
        (
            "difference",
            "not compared: --architecture may ask for heads that the source does not hold"
            if arguments.architecture
            else comparison.describe(model, params, published),
        ),
        ("written to", str(target)),
    ):
        print(f"{label:<14}{value}")
    return 0


def _as_transformers_reads_it(tokenizer: Any, config: Any, scratch: Path) -> Path | None:
    """The folder of a checkpoint's tokenizer, or what is to be exported in its place."""
    from flax_transformers.data.tokenizer_export import export_folder

    if tokenizer is None or not Path(tokenizer).is_dir():
        return None
    limit = getattr(config, "max_positions", None)
    return export_folder(Path(tokenizer), scratch / "exported", limit)


def _two_tokenizers(folder: Path) -> str:
    """Where they stay."""
    return (
        "nothing: a tokenizer for each side is not written in the format of transformers; encode "
        f"sources with {folder / 'tokenizer'}, decode with {folder / 'target_tokenizer'}"
    )


def _write_checkpoint(target: Path, model: Any, params: Any, source: Path) -> None:
    """Step 0 of a workdir: weights, the model's config and the tokenizer, and no optimizer.

    It is written beside ``target``, which appears when all is there.
    """
    from flax_transformers.families import side_files
    from flax_transformers.families.hub_write import appearing
    from flax_transformers.training.checkpoints import CheckpointConfig, Checkpoints
    from flax_transformers.training.restore import converted_meta

    files = {f"tokenizer/{name}": file for name, file in side_files.carried_files(source).items()}
    with appearing(target) as folder:
        checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(asynchronous=False))
        checkpoints.save(0, {"params": params}, converted_meta(model.config), files)
        checkpoints.close()
