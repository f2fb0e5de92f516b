"""Log-probabilities of a reference model: computed once, and stored beside the prepared data."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import flax.linen as nn
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from flax_transformers.checkpointing.weights_note import Weights, note_weights
from flax_transformers.data.pipeline.loader import ordered_batches
from flax_transformers.data.store.files import digest
from flax_transformers.data.store.token_store import TokenStore
from flax_transformers.errors import UserError
from flax_transformers.models.config import ComputeConfig
from flax_transformers.parallel.distributed import (
    compiled_together,
    of_all_processes,
    raise_together,
    wait_for_all,
)
from flax_transformers.parallel.mesh import make_mesh
from flax_transformers.parallel.rules import (
    batch_sharding,
    check_batch_size,
    host_rows,
    place_rows,
)
from flax_transformers.post_training.chat_data import (
    ConversationExamples,
    ConversationSpec,
    PreparedChat,
)
from flax_transformers.storage.folders import open_folder
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.step import check_fits, compile_evaluation_step, model_functions

log = logging.getLogger(__name__)


class ReferenceWeights(Weights, Protocol):
    """A model that is not read yet."""

    path: str
    compute: ComputeConfig
    """How it is computed."""

    def load(self, mesh: Mesh) -> tuple[nn.Module, Any]:
        """The model and its parameters."""


@dataclass(frozen=True)
class _Pass:
    """What log-probabilities are computed with. ``objective``: a `DirectPreference`."""

    objective: Any
    config: TrainConfig
    prepared: PreparedChat
    weights: ReferenceWeights
    spec: ConversationSpec
    length: int

    def name(self, store: TokenStore) -> str:
        """The file of one split of a store."""
        settings = [self.length, self.spec.completions, self.weights.path]
        if self.weights.compute.dtype != "float32":
            settings.append(self.weights.compute.dtype)
        return f"reference/{digest({'of': [store.fingerprint, settings]})[:16]}.npz"

    def of_store(self, store: TokenStore, fingerprint: str | None) -> np.ndarray:
        """The log-probabilities of all sequences of a store, float32 [n]: stored, or computed."""
        stored = self._stored(store, fingerprint)
        # Processes may have copies of the store, of which one alone has the file.
        if of_all_processes(stored is not None).all() and stored is not None:
            return stored
        fault = None
        if fingerprint is None:
            fault = UserError(
                f"the reference model {self.weights.path} is not there, and its log-probabilities "
                f"are not in {store.directory}; restore that folder, or set objective.reference"
            )
        raise_together(fault, f"has no reference model {self.weights.path}")
        assert fingerprint is not None
        found = self._computed(store)
        self._keep(store, fingerprint, found)
        return found

    def _stored(self, store: TokenStore, fingerprint: str | None) -> np.ndarray | None:
        folder, name = open_folder(store.directory), self.name(store)
        stored = _read(folder.read(name), store) if folder.exists(name) else None
        if stored is None:
            return None
        same = fingerprint in (None, stored[0]) or stored[0] == self.weights.earlier_fingerprint()
        return stored[1] if same else None

    def _keep(self, store: TokenStore, fingerprint: str, found: np.ndarray) -> None:
        """Writes the log-probabilities: process 0, and then each with a copy of the store."""
        first = jax.process_index() == 0
        if not first:
            wait_for_all()
        if first or self._stored(store, fingerprint) is None:
            content = io.BytesIO()
            np.savez(content, log_probs=found, weights=np.array(fingerprint))
            try:
                open_folder(store.directory).write(self.name(store), content.getvalue())
            except (UserError, OSError) as error:
                log.warning(
                    "the log-probabilities of the reference cannot be kept in %s (%s); they are "
                    "computed at each start", store.directory, error,
                )  # fmt: skip
        if first and jax.process_count() > 1:
            wait_for_all()

    def _computed(self, store: TokenStore) -> np.ndarray:
        config, spec = self.config, self.spec
        mesh, size = make_mesh(config.mesh), config.evaluation.batch_size
        check_batch_size(size, 1, mesh, name="evaluation.batch_size")
        model, params = self.weights.load(mesh)
        self._check(model)
        functions, objective = model_functions(model), self.objective

        def step(params: Any, batch: Any) -> jax.Array:
            return objective.log_probs(functions, params, batch)[0]

        sharding, examples = batch_sharding(mesh), ConversationExamples(store, spec)
        compiled = compiled_together(compile_evaluation_step(step, params, mesh))
        rows = host_rows(sharding, size)
        found = np.zeros(store.num_sentences, np.float32)
        log.info(
            "computing log-probabilities of the reference %s for %d sequences of %s (%s)",
            self.weights.path, len(found), store.directory, store.split,
        )  # fmt: skip
        settings: dict[str, Any] = {"sequence_length": self.length, "batch_size": size, "seed": 0}
        batches = ordered_batches(
            examples, objective, self.prepared.vocabulary, rows=rows, **settings
        )
        with jax.set_mesh(mesh):
            for number, local in enumerate(batches):
                del local["example_id"]
                values = np.asarray(compiled(params, place_rows(local, rows, sharding, size)))
                first = number * size
                for row in range(min(size, len(examples) - first)):
                    numbers = examples.numbers_of(first + row)
                    found[numbers] = values[row, : len(numbers)]
        return found

    def _check(self, model: nn.Module) -> None:
        check_fits(self.objective, model)
        theirs, ours = model.config.vocab_size, self.prepared.vocabulary.size
        if theirs < ours:
            raise UserError(
                f"the reference model {self.weights.path} has {theirs} tokens, but the tokenizer "
                f"has {ours}; set objective.reference to a model with this tokenizer"
            )
        limit = model.config.input_limits()["input_ids"].length
        if limit is not None and limit < self.length:
            raise UserError(
                f"the reference model {self.weights.path} reads {limit} tokens, but sequences have "
                f"{self.length}; set --phases.0.sequence-length {limit}"
            )


def _read(content: bytes, store: TokenStore) -> tuple[str, np.ndarray] | None:
    """Fingerprint of the weights and log-probabilities in a file; None if it is damaged."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as stored:
            weights, found = str(stored["weights"]), np.array(stored["log_probs"], np.float32)
    except Exception as error:  # each damage to a zip archive has an error of its own
        log.warning(
            "the log-probabilities of the reference in %s (%s) cannot be read (%s); they are "
            "computed again", store.directory, store.split, error,
        )  # fmt: skip
        return None
    return (weights, found) if found.shape == (store.num_sentences,) else None


def with_reference(
    objective: Any,
    config: TrainConfig,
    prepared: PreparedChat,
    weights: Callable[[str], ReferenceWeights],
    workdir: epath.Path | None,
) -> PreparedChat:
    """The data with the log-probabilities of the reference model of ``DirectPreference``.

    ``weights``: the model at a path. ``workdir``: of the run, which notes the reference; None where
    nothing is trained. Raises UserError if there is no reference, if it is another one than the
    run began with, and if it does not fit the data.
    """
    path = objective.reference or config.init_from
    if path is None:
        raise UserError(
            "DirectPreference compares with a reference model; set --init-from to the model that "
            "is trained, or objective.reference to another one"
        )
    length = max(phase.sequence_length for phase in config.phases)
    spec = objective.window_spec(length)
    assert isinstance(spec, ConversationSpec)
    model = weights(path)
    fingerprint = model.fingerprint()
    if workdir is not None:
        note_weights(workdir, "reference", path, model)
    work = _Pass(objective, config, prepared, model, spec, length)
    found = dict(prepared.reference)
    for store in filter(None, (prepared.train, prepared.validation)):
        if store.num_documents and store.fingerprint not in found:
            found[store.fingerprint] = work.of_store(store, fingerprint)
    return replace(prepared, reference=found)
