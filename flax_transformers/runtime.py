"""What every command that touches devices does first."""

from __future__ import annotations

import contextlib
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, get_args

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from flax_transformers import pretrained, ranges
from flax_transformers.checkpointing.step_directories import (
    SavedStep,
    finished_steps,
    has_checkpoint,
    read_meta,
)
from flax_transformers.checkpointing.weights_note import note_weights
from flax_transformers.data.base import Compare, Tokenizers
from flax_transformers.data.config import DataConfig
from flax_transformers.data.dataset import Dataset, open_dataset, prepare, tokenizers
from flax_transformers.data.sources.documents import listed
from flax_transformers.data.tokenizers.fitting import fitted_vocabulary, padded_vocabulary
from flax_transformers.data.tokenizers.load import Tokenizer, load_tokenizer, train_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.evaluation.prediction.examples import (
    published_preprocessing,
    stated_preprocessing,
)
from flax_transformers.huggingface.family import build_model
from flax_transformers.huggingface.read import files_of_model, tokenizer_folder
from flax_transformers.models.config import ComputeConfig, TextConfig, TransformerConfig
from flax_transformers.objectives.labelled import Framing, frame_of
from flax_transformers.parallel import distributed
from flax_transformers.parallel.limits import Limits
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.restore import RestoredModel, restore_model, saved_part, saved_tokenizers
from flax_transformers.storage.file_hashes import cache_root, content_digest
from flax_transformers.storage.paths import is_bucket
from flax_transformers.training.check_run import LABEL_HEADS, check_vocabulary
from flax_transformers.training.config import TrainConfig


@dataclass(frozen=True)
class ModelOptions:
    """Where a model that belongs to no run is computed, and how."""

    mesh: MeshConfig = field(default_factory=MeshConfig)
    compute: ComputeConfig = field(default_factory=lambda: ComputeConfig(dtype="auto"))
    limits: Limits = field(default_factory=Limits)


def start(platform: str | None, limits: Limits | None = None) -> None:
    """Joins the other processes, checks the platform, and turns on the compilation cache."""
    _allow_virtual_devices()
    distributed.start_processes(limits, platform)
    distributed.check_platform(platform)
    # What the environment or the program around has set stays.
    if jax.config.values["jax_compilation_cache_dir"] is None:
        compiled = os.path.join(cache_root(), "compiled")
        jax.config.update("jax_compilation_cache_dir", compiled)
    if jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 1.0:  # JAX's default
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _allow_virtual_devices() -> None:
    """Gives XLA's CPU backend threads enough for several virtual devices.

    Each collective in flight holds a thread, and a device can have several in flight: with one
    thread per device, the default, such programs can come to a standstill. XLA reads NPROC.
    """
    devices = ranges.from_environment("JAX_NUM_CPU_DEVICES", ranges.integers(1, 1024), 1)
    if devices > 1:
        os.environ.setdefault("NPROC", str(8 * devices))


def prepared_data(
    data: DataConfig, of_run: Tokenizers = MappingProxyType({}), trained_on: str | None = None
) -> Dataset:
    """The prepared data of a config; the store is prepared first if this is the only process.

    A finished store is opened without its source. A store that is prepared for a run which has
    trained already gets the tokenizers ``of_run``. If that run was ``trained_on`` a store with
    another fingerprint, which an earlier version made of the same source, that one is opened, and
    none is prepared.
    """
    if trained_on is None:
        return _prepared(data, of_run)

    def of_the_run(dataset: Dataset) -> bool:
        return trained_on in (dataset.fingerprint, *dataset.known_as)

    stores = data.former_stores(of_run)
    former = filter(of_the_run, (_prepared(replace(data, store=one), of_run) for one in stores))
    finished = data.preparation(of_run=of_run).is_finished()
    if not finished and (found := next(former, None)) is not None:
        return found
    prepared = _prepared(data, of_run)
    return prepared if of_the_run(prepared) else next(former, prepared)


def check_known_tokenizers(config: TrainConfig) -> None:
    """Raises UserError if the model or the objective of a new run does not fit its tokenizers.

    Before the data are prepared, which can take hours; `check_run` compares again what is prepared.
    Nothing is checked if a tokenizer is trained on the data, or nothing is left to prepare.
    """
    configs = config.data.tokenizers
    if not configs or any(one.needs_training for one in configs.values()):
        return
    try:
        _check_tokenizers(config, {name: train_tokenizer(one, ()) for name, one in configs.items()})
    except UserError:
        # Asked last, because the name of a store can be that of all bytes of its source.
        if not config.data.preparation().is_finished():
            raise


def _check_tokenizers(config: TrainConfig, of_data: Tokenizers) -> None:
    model, target = config.model, of_data.get("target_tokenizer")
    if not isinstance(model, TextConfig):
        return
    of_targets = None if target is None else target.vocabulary
    whole = replace(of_data["tokenizer"].vocabulary, target=of_targets)
    entries = model.vocab_size, model.pad_id, model.decoder.vocab_size
    known = fitted_vocabulary(whole, *entries)
    try:
        check_vocabulary(config, known)
    except UserError:
        if whole.roles.keys() - known.roles.keys() - {"pad"}:  # rather: the model is too small
            check_vocabulary(config, padded_vocabulary(whole, *entries[:2]))
        raise


def store_of_run(workdir: epath.Path) -> str | None:
    """The fingerprint of the data in the newest readable checkpoint; None without a checkpoint."""
    directory = workdir / "checkpoints"
    for step in reversed(finished_steps(directory)):
        with contextlib.suppress(UserError):
            return read_meta(directory / str(step)).get("store")
    return None


def _prepared(data: DataConfig, of_run: Tokenizers) -> Dataset:
    if jax.process_count() > 1:
        compare: Compare = "nothing" if jax.process_index() else "warning"
        prepared = open_dataset(replace(data, verify=False), of_run=of_run, compare=compare)
        if data.verify:
            _verify_together(prepared)
        if jax.process_index() == 0:
            prepared.print_report()
        return prepared
    return prepare(data, of_run=of_run, compare="warning")


def _verify_together(prepared: Dataset) -> None:
    """Verifies a share of the data in each of the processes that see the same files.

    On a file system that they share, manifests have one inode and time of change; a copy on the
    disk of another machine has others, and is verified there.
    """
    folder = Path(prepared.directory)
    found = [*folder.glob("manifest.json"), *folder.glob("*/manifest.json")]  # of a mixture
    stats = [path.stat() for path in sorted(found)]
    seen = repr([(stat.st_ino, stat.st_ctime_ns) for stat in stats])
    everywhere = distributed.of_all_processes(np.uint32(zlib.crc32(seen.encode())))
    mine = jax.process_index()
    peers = np.flatnonzero(everywhere == everywhere[mine]).tolist()
    fault = None
    try:
        prepared.verify_share(peers.index(mine), len(peers))
    except UserError as error:
        fault = error
    distributed.raise_together(fault, f"found damaged data in {prepared.directory}")


def evaluation_sets(config: TrainConfig, prepared: Dataset) -> list[tuple[str, Dataset]]:
    """The evaluation sets of a config by name, prepared with the tokenizers and the classes of the
    ``prepared`` training data, each as what is held out.

    Raises UserError for a class that is not among those of the training data, if the objective or
    the probes use labels.
    """
    found = []
    labels = bool(
        config.evaluation.probes or LABEL_HEADS.intersection(config.objective.needs.heads)
    )
    of_run = tokenizers(prepared)
    for one in config.evaluation.sets:
        data = config.data.of_evaluation_set(one, prepared.label_names)
        own = prepared_data(data, of_run)
        if tokenizers(own).keys() != of_run.keys() or any(
            of_run[name].fingerprint != tokenizer.fingerprint
            for name, tokenizer in tokenizers(own).items()
        ):
            raise UserError(
                f"the evaluation set {one.name!r} was prepared in {own.directory} with another "
                "tokenizer than the training data; delete that folder to prepare it again"
            )
        theirs, ours = (getattr(each, "classes", each.label_names) for each in (own, prepared))
        if labels and theirs != ours:
            raise UserError(
                f"the evaluation set {one.name!r} has the classes {listed(theirs)}, but the "
                f"training data has {listed(ours)}; give both the same"
            )
        own = completed_data(config, prepared.scored_on(fitted_data(config, own)))
        found.append((one.name, own))
    return found


@dataclass(frozen=True)
class StoredModel:
    """A model whose weights have not been read: where it is, its config and its tokenizers.

    ``architecture``: what it is read as, if not as its own.
    """

    source: SavedStep | Path
    architecture: str | None
    model: TransformerConfig
    tokenizer: Tokenizer | None
    target_tokenizer: Tokenizer | None

    @property
    def place(self) -> str:
        """The folder."""
        return str(pretrained.folder_of(self.source))

    @property
    def trained_on(self) -> str | None:
        """The fingerprint of the data of a run; None for a folder in Hugging Face format."""
        return self.source.meta.get("store") if isinstance(self.source, SavedStep) else None

    @property
    def files(self) -> epath.Path | Path:
        """The folder of the tokenizer and of the files that describe preprocessing, if any."""
        folder: epath.Path | Path = pretrained.tokenizer_folders(self.source)[0]
        return folder

    def of_run(self, name: str) -> Any:
        """A field of the config of the model's run; None for weights that belong to no run."""
        return saved_part(self.source, name) if isinstance(self.source, SavedStep) else None


def stored_model(path: str, architecture: str | None = None) -> StoredModel:
    """The model of a run, or of a folder in Hugging Face format, before its weights are read.

    ``architecture``: what that folder is read as, where it is not its own. Raises UserError for
    what is missing or damaged.
    """
    source = pretrained.find_pretrained(path)
    if isinstance(source, SavedStep) and architecture is not None:
        raise UserError(f"{path} is a run, whose architecture is known; omit --architecture")
    model = pretrained.describe_pretrained(source, architecture)
    if isinstance(source, SavedStep):
        return StoredModel(source, None, model, *saved_tokenizers(source))
    text = isinstance(model, TextConfig)
    tokenizer = load_tokenizer(tokenizer_folder(source)) if text else None
    return StoredModel(source, architecture, model, tokenizer, None)


def restored_model(
    stored: StoredModel, mesh: Mesh | None = None, compute: ComputeConfig | None = None
) -> RestoredModel:
    """A stored model with its weights, and the generation settings of ``stored.model``.

    Raises UserError for what is missing or damaged.
    """
    restored = _restored(stored, mesh, compute)
    config: Any = restored.model_config
    settings = getattr(stored.model, "generation", None)
    if settings is None or config.generation == settings:
        return restored
    config = replace(config, generation=settings)
    return replace(restored, model_config=config, model=restored.model.clone(config=config))


def _restored(
    stored: StoredModel, mesh: Mesh | None, compute: ComputeConfig | None
) -> RestoredModel:
    if isinstance(stored.source, SavedStep):
        return restore_model(stored.source, mesh, compute)
    mesh = mesh or make_mesh(MeshConfig())
    compute = compute or ComputeConfig(dtype="auto")
    model, params = pretrained.load_pretrained(
        stored.source, architecture=stored.architecture, compute=compute, mesh=mesh
    )
    return RestoredModel(model.config, model, params, stored.tokenizer, None, mesh, step=0)


def with_initial_model(
    config: TrainConfig, overrides: Sequence[str], workdir: PathLike[str] | None = None
) -> TrainConfig:
    """``config`` with the model of ``config.init_from``, so that nobody has to describe it twice.

    A run that has a checkpoint in ``workdir`` resumes with the model that is there. Raises
    UserError for fields among the ``overrides`` of the command line that do not agree, and for a
    phase that is too long for the model.
    """
    if config.init_from is None:
        return config
    resumes = workdir is not None and has_checkpoint(workdir)
    source = workdir if workdir is not None and resumes else config.init_from
    given = given_fields(overrides)
    model = pretrained.initial_model(source, config.model, given, resumes=resumes)
    return with_model(config, model, f"--init-from {config.init_from}")


def given_fields(overrides: Sequence[str]) -> set[str]:
    """The fields of the model that ``overrides`` of the command line set, wholly or in part."""
    options = [part.partition("=")[0] for part in overrides if part.startswith("--model.")]
    return {option.split(".")[1].replace("-", "_") for option in options}


def with_model(config: TrainConfig, model: TransformerConfig, place: str) -> TrainConfig:
    """``config`` with a model that was found in ``place``.

    Raises UserError, naming both, if a phase is longer than the model takes.
    """
    limit = model.length_limit
    for number, phase in enumerate(config.phases):
        if limit is not None and phase.sequence_length > limit:
            raise UserError(
                f"{place} holds a model of {limit} positions, but phases.{number} has "
                f"sequence_length {phase.sequence_length}; set --phases.{number}.sequence-length "
                f"{limit}"
            )
    return replace(config, model=model)


def initial_weights(config: TrainConfig) -> Callable[[Mesh], Any] | None:
    """What reads the weights of ``config.init_from``; None for a run that starts from nothing."""
    path = config.init_from
    if path is None:
        return None
    return lambda mesh: pretrained.initial_parameters(path, config.model, mesh, config.seed)


def teacher(
    config: TrainConfig, prepared: Dataset, workdir: epath.Path | None = None
) -> Callable[[Mesh], tuple[Any, Any]] | None:
    """What reads the teacher of an objective with one; None for other objectives.

    ``workdir``: of the run that is trained, which notes the teacher. Raises UserError for a teacher
    without a classifier of the student's classes and inputs, and for another one than the run began
    with.
    """
    path = getattr(config.objective, "teacher", None)
    if path is None:
        return None
    stored, own = stored_model(path), config.model
    theirs: Any = stored.model
    place = f"objective.teacher {path}"
    if not hasattr(build_model(theirs), "classify"):
        raise UserError(f"{place} holds a {theirs.architecture}, which is no classifier")
    names = theirs.label_names, prepared.label_names or own.label_names
    if theirs.num_labels != own.num_labels or (all(names) and names[0] != names[1]):
        raise UserError(
            f"{place} knows {theirs.num_labels} classes ({listed(names[0])}), the student "
            f"{own.num_labels} ({listed(names[1])}); give a teacher of the same classes in the "
            "same order"
        )
    tokens = prepared.tokenizer
    if tokens is not None and (
        stored.tokenizer is None or stored.tokenizer.fingerprint != tokens.fingerprint
    ):
        raise UserError(
            f"{place} has another tokenizer than the data; set --data.tokenizer.path to that of "
            "the teacher"
        )
    if tokens is not None:
        limit = theirs.input_limits()["input_ids"].length
        longest = max(phase.sequence_length for phase in config.phases)
        if limit is not None and limit < longest:
            raise UserError(
                f"{place} reads {limit} tokens, but sequences have {longest}; set "
                f"--phases.0.sequence-length {limit}, or give another teacher"
            )
    resumes = workdir is not None and has_checkpoint(workdir)
    _check_framing(config, stored, place, resumes=resumes)
    _check_pixels(config, stored, place, resumes=resumes)
    if workdir is not None:
        note_weights(workdir, "teacher", path, StoredWeights(stored.place, config.compute))

    def load(mesh: Mesh) -> tuple[Any, Any]:
        restored = restored_model(stored, mesh, config.compute)
        return restored.model, restored.params

    return load


def _check_framing(config: TrainConfig, stored: StoredModel, place: str, *, resumes: bool) -> None:
    """The teacher of texts was trained with the special tokens that the student's objective puts
    around them."""
    ours = getattr(config.objective, "framing", None)
    theirs = None if ours is None else framing_of(stored)
    if theirs in (None, ours):
        return
    said = f"{place} reads texts with framing {theirs!r}, the student has {ours!r}"
    if not resumes:
        raise UserError(f"{said}; set --objective.framing {theirs}")
    # Earlier versions began such runs.
    logging.getLogger(__name__).warning("%s; a new run needs --objective.framing %s", said, theirs)


def framing_of(stored: StoredModel) -> str | None:
    """The framing that a model was trained with: that of its run, or that of its family, or what
    the special tokens of its tokenizer say instead. None if nothing tells. Logs where no framing
    has these special tokens."""
    with contextlib.suppress(UserError):  # the run has an objective that is not registered here
        if (framing := getattr(stored.of_run("objective"), "framing", None)) is not None:
            return framing
    usual, tokenizer = getattr(stored.model, "framing", None), stored.tokenizer
    if tokenizer is None:
        return usual
    noted = tokenizer.facts.run_frame or tokenizer.vocabulary.frame
    if noted is None:
        return usual
    possible = []
    for framing in get_args(Framing):
        with contextlib.suppress(UserError):  # the tokenizer lacks its special tokens
            frame = frame_of(framing, tokenizer.vocabulary)
            if (frame.before, frame.after) == (noted.before, noted.after):
                possible.append(framing)
    if not possible:
        logging.getLogger(__name__).warning(
            "the tokenizer of %s puts %s before a text and %s after it, as no framing does; texts "
            "get the special tokens of framing %r",
            stored.place,
            *(tokenizer.pieces(ids) for ids in (noted.before, noted.after)),
            usual,
        )
    return usual if usual in possible or not possible else possible[0]


def _check_pixels(config: TrainConfig, stored: StoredModel, place: str, *, resumes: bool) -> None:
    """The teacher of images takes what the student's objective gives."""
    ours: Any = config.model
    theirs: Any = stored.model
    channels = getattr(theirs, "num_channels", None)
    if channels != getattr(ours, "num_channels", None):
        raise UserError(f"{place} reads other inputs than the student; give one of the same kind")
    if channels is None:
        return
    saved = stored.of_run("objective")
    is_published = saved is None and "image_mean" in stated_preprocessing(stored.files, theirs)
    if is_published:
        saved, _ = published_preprocessing(stored.files, theirs)
    for name in ("mean", "std"):
        wanted, given = getattr(saved, name, None), getattr(config.objective, name, None)
        if wanted is None or given is None:
            continue
        wide = [each * channels if len(each) == 1 else each for each in (wanted, given)]
        if wide[0] != wide[1]:
            said = f"{place} was trained with objective.{name} {wanted}, the student has {given}"
            if not (is_published and resumes):
                raise UserError(f"{said}; set the student's to the same")
            # Earlier versions began such runs.
            logging.getLogger(__name__).warning("%s; a new run needs the same", said)


def built(config: TrainConfig) -> nn.Module:
    """The model of a config, for the devices that there are."""
    return build_model(config.model, config.compute.resolve(jax.devices()[0].platform))


def fitted_data(config: TrainConfig, prepared: Dataset) -> Dataset:
    """``prepared`` with the part of its vocabulary that the config's model knows.

    Raises UserError if the text holds a token that the model has no embedding for.
    """
    model = config.model
    if not isinstance(model, TextConfig):
        return prepared
    return prepared.fitted(model.vocab_size, model.pad_id, model.decoder.vocab_size)


def _files_of_weights(found: SavedStep | Path) -> list[Path]:
    """Without what may be added later, such as a README or the evaluation of a checkpoint."""
    if not isinstance(found, SavedStep):
        return files_of_model(found)
    files = (file for part in ("state", "meta") for file in Path(found.folder, part).rglob("*"))
    return [
        file
        for file in files
        if not any(part.startswith(".") for part in file.relative_to(found.folder).parts)
    ]


@dataclass(frozen=True)
class StoredWeights:
    """A model that is not read yet, for objectives that compare with another one."""

    path: str
    compute: ComputeConfig

    def fingerprint(self) -> str | None:
        """Hash of config and weights, or of the path of those in a bucket; None if they are not
        there."""
        return self._hash_of(_files_of_weights)

    def earlier_fingerprint(self) -> str | None:
        """The same of all files in the folder, as earlier versions noted it."""
        return self._hash_of(lambda found: Path(pretrained.folder_of(found)).rglob("*"))

    def _hash_of(self, files: Callable[[SavedStep | Path], Iterable[Path]]) -> str | None:
        try:
            found = pretrained.find_pretrained(self.path)
        except UserError:
            return None
        folder = pretrained.folder_of(found)
        if is_bucket(epath.Path(folder)):
            return str(folder)
        chosen = sorted(path for path in files(found) if path.is_file())
        return content_digest([(str(path.relative_to(folder)), path) for path in chosen])

    def load(self, mesh: Mesh) -> tuple[nn.Module, Any]:
        """The model and its parameters."""
        return pretrained.load_pretrained(self.path, compute=self.compute, mesh=mesh)


def completed_data(
    config: TrainConfig, prepared: Dataset, workdir: epath.Path | None = None
) -> Dataset:
    """``prepared`` with what the objective computes from it before the first step, if it does.

    ``workdir``: of the run that is trained. See `post_training.reference`.
    """
    complete = getattr(config.objective, "complete_data", None)
    if complete is None:
        return prepared
    compute = config.compute.resolve(jax.devices()[0].platform)
    completed: Dataset = complete(
        config, prepared, lambda path: StoredWeights(path, compute), workdir
    )
    return completed


def with_label_names(config: TrainConfig, prepared: Dataset) -> TrainConfig:
    """``config`` with the names of the data's classes in its model, if it learns them: they go
    with every checkpoint, and into what is exported."""
    learns = not LABEL_HEADS.isdisjoint(config.objective.needs.heads)
    if not learns or not prepared.label_names or config.model.label_names:
        return config
    model = replace(config.model, label_names=prepared.label_names)
    return replace(config, model=model)
