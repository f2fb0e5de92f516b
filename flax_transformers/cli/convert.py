"""Convert a model: a Hugging Face directory to a checkpoint of ours, or the other way round."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax_transformers.cli.shared_arguments import MODEL_HELP, add_architecture

if TYPE_CHECKING:
    from flax_transformers.checkpointing.step_directories import Found


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
    from flax_transformers import runtime
    from flax_transformers.checkpointing.manager import find_checkpoint
    from flax_transformers.cli.config_file import refuse
    from flax_transformers.errors import UserError
    from flax_transformers.huggingface import folder_kinds
    from flax_transformers.huggingface import read as hub_read
    from flax_transformers.huggingface import write as hub_write
    from flax_transformers.pretrained import is_checkpoint, load_pretrained

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
    model, params = load_pretrained(
        source, architecture=arguments.architecture, dtype=arguments.dtype or "float32"
    )
    if from_ours:
        model, carried = _write_directory(target, model, params, find_checkpoint(source))
        published = target
    else:
        published = folder_kinds.inner_folder(hub_read.find_directory(source) or Path(source))
        carried = _write_checkpoint(target, model, params, published)
    _print_summary(
        model, params, published, carried=carried, target=target, asked=arguments.architecture
    )
    return 0


def _print_summary(
    model: Any, params: Any, published: Path, *, carried: str, target: Path, asked: str | None
) -> None:
    """What was converted; ``published`` is the directory in Hugging Face format."""
    import jax

    from flax_transformers.cli import comparison
    from flax_transformers.huggingface import write as hub_write
    from flax_transformers.huggingface.family import family_of

    difference = (
        "not compared: --architecture may ask for heads that the source does not hold"
        if asked
        else comparison.describe(model, params, published)
    )
    for label, value in (
        ("family", family_of(model.config).model_types[0]),
        ("architecture", model.config.architecture),
        ("parameters", f"{hub_write.published_parameters(model):,}"),
        ("dtype", str(jax.tree.leaves(params)[0].dtype)),
        ("carried along", carried or "nothing: no tokenizer to carry"),
        ("difference", difference),
        ("written to", str(target)),
    ):
        print(f"{label:<14}{value}")


def _write_directory(target: Path, model: Any, params: Any, found: Found) -> tuple[Any, str]:
    """A checkpoint of ours in Hugging Face format: the model as written, and what was carried."""
    from etils import epath

    from flax_transformers.checkpointing.step_directories import write_files
    from flax_transformers.cli.run_files import run_files, with_ids_of
    from flax_transformers.huggingface import side_files
    from flax_transformers.huggingface import write as hub_write
    from flax_transformers.storage.paths import is_bucket

    # Of two tokenizers, one alone would write the target side wrongly.
    two_tokenizers = (found.folder / "target_tokenizer").is_dir()
    trained = "config" in found.meta
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = None if two_tokenizers else found.folder / "tokenizer"
        if tokenizer is not None and is_bucket(tokenizer):
            write_files(epath.Path(scratch), {"tokenizer": tokenizer})
            tokenizer = epath.Path(scratch) / "tokenizer"
        if trained:
            model = with_ids_of(model, None if tokenizer is None else Path(tokenizer))
        beside = _as_transformers_reads_it(tokenizer, model.config, Path(scratch))
        files = run_files(found, model.config, beside) if trained else {}
        carried = [*side_files.carried_files(beside), *files]
        hub_write.save_directory(target, model, params, tokenizer_from=beside, files=files)
    if two_tokenizers:
        return model, _two_tokenizers(found.folder)
    return model, ", ".join(dict.fromkeys(carried))


def _as_transformers_reads_it(tokenizer: Any, config: Any, scratch: Path) -> Path | None:
    """The folder of a checkpoint's tokenizer, or what is to be exported in its place."""
    from flax_transformers.data.tokenizers.export import export_folder

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


def _write_checkpoint(target: Path, model: Any, params: Any, source: Path) -> str:
    """Step 0 of a workdir: weights, the model's config and the tokenizer, and no optimizer.

    It is written beside ``target``, which appears when all is there. Returns what was carried.
    """
    from flax_transformers.checkpointing.manager import CheckpointConfig, Checkpoints
    from flax_transformers.data.tokenizers.load import published_files
    from flax_transformers.huggingface import side_files
    from flax_transformers.huggingface.write import appearing
    from flax_transformers.models.config import TextConfig
    from flax_transformers.training.restore import converted_meta

    carried = side_files.carried_files(source)
    # With config.json, which may be all that tells the tokenizer's class.
    told = published_files(source) if isinstance(model.config, TextConfig) else {}
    files = {f"tokenizer/{name}": Path(file) for name, file in {**told, **carried}.items()}
    with appearing(target) as folder:
        checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(asynchronous=False))
        checkpoints.save(0, {"params": params}, converted_meta(model.config), files)
        checkpoints.close()
    return ", ".join(carried or told)
