"""``flax-transformers convert``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional

from flax_transformers.cli.parsing import Architecture, Flag, Model, option, refuse_arguments
from flax_transformers.errors import UserError

if TYPE_CHECKING:
    from flax_transformers.checkpointing.step_directories import SavedStep
    from flax_transformers.models.config import TransformerConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Convert:
    """Convert a Hugging Face directory to a checkpoint of this package, or a checkpoint to one."""

    source: Model
    target: Positional[Annotated[str, option("TARGET")]]
    """A new folder for the other format."""
    architecture: Architecture = None
    dtype: Annotated[Literal["float32", "bfloat16", "float16"] | None, option()] = None
    """Type of the tensors in a Hugging Face directory (default: float32)."""
    average: Annotated[str | None, option("LAST_N|STEP,STEP")] = None
    """Average the weights of the newest N checkpoints of a run, or of these steps (two or more)."""
    adapter_of: Annotated[str | None, option("MODEL")] = None
    """Write only the adapters of a run with lora.rank, in PEFT's format, for this model: the one
    that the run started from, in Hugging Face format."""
    push_to_hub: Annotated[str | None, option("OWNER/NAME")] = None
    """Upload TARGET to this repository of the Hugging Face hub, with its model card."""
    private: Flag = False
    """Make the repository of --push-to-hub private, if there is none yet."""

    def run(self, overrides: Sequence[str]) -> int:
        from flax_transformers import pretrained, runtime
        from flax_transformers.checkpointing.step_directories import SavedStep
        from flax_transformers.export import push_to_hub, write_run
        from flax_transformers.huggingface import write as hub_write
        from flax_transformers.huggingface.read import tokenizer_folder
        from flax_transformers.parallel.limits import Limits
        from flax_transformers.parallel.watchdog import watchdog

        refuse_arguments(overrides)
        if "://" in self.target:
            raise UserError(
                f"TARGET is {self.target}; convert into a folder of this machine, then copy it"
            )
        source, target = self.source, Path(self.target).expanduser().absolute()
        hub_write.require_new(target)
        from_ours = pretrained.is_checkpoint(source)
        self._check(from_ours)
        runtime.start(None)
        watchdog.start(Limits())
        if self.adapter_of is not None:
            if self.architecture or self.dtype or self.average:
                raise UserError(
                    "--adapter-of excludes --architecture, --dtype and --average; omit these"
                )
            with watchdog.phase("save"):
                pretrained.save_adapter(target, source, self.adapter_of)
            print(f"adapters of {source} for {self.adapter_of} written to {target}")
            return 0
        steps = () if self.average is None else _steps_to_average(source, self.average)
        with watchdog.phase("restore"):
            found = pretrained.find_pretrained(steps[-1] if steps else source)
            _warn_of_tokenizer(found, pretrained.describe_pretrained(found, self.architecture))
            model, params = pretrained.load_pretrained(
                found,
                architecture=self.architecture,
                dtype="float32" if steps else self.dtype or "float32",
            )
            if steps:
                params = _averaged(steps, self.architecture, params, self.dtype or "float32")
                log.info("average of the steps %s", ", ".join(step.name for step in steps))
        with watchdog.phase("save"):
            if isinstance(found, SavedStep):
                averaged = [int(step.name) for step in steps]
                model, params, names = write_run(target, model, params, found, averaged)
                carried, published = _summary_of_files(names, found), target
            else:
                published = tokenizer_folder(found)
                carried = _write_checkpoint(target, model, params, published)
        with watchdog.phase("evaluation"):
            _print_summary(
                model, params, published, carried=carried, target=target, asked=self.architecture
            )
        if self.push_to_hub is not None:
            with watchdog.phase("save"):
                url = push_to_hub(target, self.push_to_hub, private=self.private)
            print(f"{'uploaded to':<14}{url}")
        return 0

    def _check(self, from_ours: bool) -> None:
        """Raises UserError for options that do not fit what the source becomes, or each other."""
        from flax_transformers.storage.hub import require_name

        if self.dtype and not from_ours:
            raise UserError(
                f"checkpoints of this package are float32, and {self.source} becomes one; leave "
                "out --dtype"
            )
        if self.push_to_hub is None:
            return
        if self.adapter_of or not from_ours:
            raise UserError("--push-to-hub is for a run that becomes a Hugging Face directory")
        require_name(self.push_to_hub)


def _steps_to_average(source: str, text: str) -> list[Any]:
    """The step folders that ``--average`` names, the newest last."""
    from flax_transformers.checkpointing.step_directories import absolute, finished_steps
    from flax_transformers.ranges import parse_integer

    folder = absolute(source) / "checkpoints"
    known = finished_steps(folder)
    if not known:
        raise UserError(f"--average is for the workdir of a run, and {source} has no checkpoints")
    found = [parse_integer(part) for part in text.split(",")]
    numbers = [number for number in found if number is not None and number >= 0]
    if len(set(numbers)) < len(found):
        raise UserError(
            f"--average is {text!r}; give a number of checkpoints, as in 3, or steps, as in 100,200"
        )
    count = numbers[0] if len(numbers) == 1 else len(numbers)
    chosen = known[max(0, len(known) - count) :] if len(numbers) == 1 else sorted(numbers)
    if not set(chosen) <= set(known) or len(chosen) < max(2, count):
        raise UserError(
            f"--average {text} asks for checkpoints that {folder} does not have, or for fewer than "
            f"two; it has {', '.join(map(str, known))}"
        )
    return [folder / str(step) for step in chosen]


def _averaged(steps: Sequence[Any], architecture: str | None, last: Any, dtype: str) -> Any:
    """The mean of the parameters of all ``steps``, of which ``last`` are those of the last one.
    Raises UserError for a step with another model."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flax_transformers import pretrained

    total = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), last)
    for step in steps[:-1]:
        found = pretrained.find_pretrained(str(step))
        if pretrained.describe_pretrained(found, architecture) != pretrained.describe_pretrained(
            pretrained.find_pretrained(str(steps[-1])), architecture
        ):
            raise UserError(f"{step} has another model than {steps[-1]}; average others")
        _, params = pretrained.load_pretrained(found, architecture=architecture)
        total = jax.tree.map(lambda a, b: a + np.asarray(b), total, params)
    return jax.tree.map(lambda leaf: (leaf / len(steps)).astype(jnp.dtype(dtype)), total)


def _warn_of_tokenizer(found: SavedStep | Path, config: TransformerConfig) -> None:
    """Warns, before any weights are read, where model and tokenizer do not fit each other."""
    from flax_transformers import pretrained
    from flax_transformers.data.tokenizers.load import load_tokenizer, published_files
    from flax_transformers.huggingface.generation_settings import writes_text
    from flax_transformers.models.config import TextConfig
    from flax_transformers.training.check_run import check_tokenizer

    folder, target = pretrained.tokenizer_folders(found)
    if not isinstance(config, TextConfig) or not folder.is_dir() or not published_files(folder):
        return
    if target is not None:  # a run, which compared both
        return
    try:
        vocabulary = load_tokenizer(folder).vocabulary
    except UserError as error:
        log.warning("the tokenizer is copied as it is: %s", error)
        return
    if vocabulary.size > config.vocab_size:
        log.warning(
            "%s: the tokenizer has %d tokens, but the model has embeddings for %d: a text with one "
            "of the others cannot be read", folder, vocabulary.size, config.vocab_size,
        )  # fmt: skip
    if writes_text(config):
        check_tokenizer(config, vocabulary, str(folder))


def _print_summary(
    model: Any, params: Any, published: Path, *, carried: str, target: Path, asked: str | None
) -> None:
    """Prints what was converted; ``published`` is the directory in Hugging Face format."""
    import jax

    from flax_transformers.huggingface import comparison
    from flax_transformers.huggingface import write as hub_write
    from flax_transformers.huggingface.family import family_of

    difference = (
        "not compared: --architecture may name heads that the source does not have"
        if asked
        else comparison.describe(model, params, published)
    )
    for label, value in (
        ("family", family_of(model.config).model_types[0]),
        ("architecture", model.config.architecture),
        ("parameters", f"{hub_write.published_parameters(model):,}"),
        ("dtype", str(jax.tree.leaves(params)[0].dtype)),
        ("other files", carried or "none: the source has no tokenizer"),
        ("difference", difference),
        ("written to", str(target)),
    ):
        print(f"{label:<14}{value}")


def _summary_of_files(names: Sequence[str], found: SavedStep) -> str:
    """The names of the files beside the weights, or why a model of two tokenizers has none."""
    if not (found.folder / "target_tokenizer").is_dir():
        return ", ".join(names)
    return (
        "none: the format of transformers has one tokenizer; encode sources with "
        f"{found.folder / 'tokenizer'}, decode targets with {found.folder / 'target_tokenizer'}"
    )


def _write_checkpoint(target: Path, model: Any, params: Any, source: Path) -> str:
    """Writes step 0 of a workdir: weights, the model's config and the tokenizer, no optimizer.

    ``target`` appears when the checkpoint is complete. Returns the names of the other files.
    """
    from etils import epath

    from flax_transformers.checkpointing.config import CheckpointConfig
    from flax_transformers.checkpointing.manager import Checkpoints
    from flax_transformers.data.tokenizers.load import published_files, read_file
    from flax_transformers.huggingface.write import appearing, files_to_carry
    from flax_transformers.models.config import TextConfig
    from flax_transformers.restore import converted_meta

    carried = files_to_carry(source, model.config)
    # config.json may be the only file that names the tokenizer's class.
    told = published_files(source) if isinstance(model.config, TextConfig) else {}
    found = {**told, **carried}
    files = {f"tokenizer/{name}": read_file(epath.Path(file)) for name, file in found.items()}
    with appearing(target) as folder:
        checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(asynchronous=False))
        checkpoints.save(0, {"params": params}, converted_meta(model.config), files)
        checkpoints.close()
    return ", ".join(carried or told)
