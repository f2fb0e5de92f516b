"""Rollouts: completions that the model in training samples, as the batches of its next steps.

A rollout of R rows is a function of the parameters, the seed and the step at which it is sampled.
It is written to ``rollouts/`` of the workdir: ``step_N.jsonl`` to be read by people, and
``step_N.npz`` with the arrays. A run that resumes between two rollouts continues with the arrays of
the last one; where a rollout begins, it samples the same completions again.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_transformers.adapters.lora import base_of
from flax_transformers.checkpointing.step_directories import has_checkpoint
from flax_transformers.data.dataset import Dataset, training_examples
from flax_transformers.data.pipeline.examples import key_of
from flax_transformers.data.pipeline.loader import stacked
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import AgreedError, UserError
from flax_transformers.generation.choices import settings_of
from flax_transformers.generation.decode import run as generate
from flax_transformers.generation.loop import Endings, TextLimits
from flax_transformers.generation.program import GenerationRequest
from flax_transformers.generation.prompts import prompt_frame, with_frame
from flax_transformers.generation.sampling import Sampling
from flax_transformers.huggingface.placement import base_keeps_logits
from flax_transformers.models.config import TextConfig
from flax_transformers.models.generation_settings import NO_SETTINGS
from flax_transformers.objectives.base import Arrays, Vocabulary
from flax_transformers.objectives.rows import end_id
from flax_transformers.parallel.distributed import compiled_together, raise_together
from flax_transformers.parallel.rules import (
    RULES,
    batch_sharding,
    host_rows,
    place_rows,
    replicated,
)
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.post_training.chat_template import (
    TemplateError,
    end_of_turn_id,
    template_in_files,
    template_of,
)
from flax_transformers.post_training.reinforcement.policy import (
    STATISTICS,
    PolicyObjective,
    completion_row,
)
from flax_transformers.post_training.reinforcement.rewards import (
    Reward,
    Scorer,
    checked_scores,
    reward_names,
    wait_for_scores,
)
from flax_transformers.storage.workdir import read_side_file, write_side_file, writing
from flax_transformers.training.config import TrainConfig
from flax_transformers.training.resume import OnlineBatches, Run
from flax_transformers.training.run_state import RunPosition
from flax_transformers.training.state import TrainState

log = logging.getLogger(__name__)

_STREAM = 0x726F6C6C
"""Sets the random numbers of rollouts apart from those of initialisation and dropout."""


@dataclass(frozen=True)
class Prompt:
    """The tokens of a prompt, int32 [n], its text, and the row of the data that rewards are given:
    "prompt", "answer", and further fields if the data has them."""

    ids: np.ndarray
    text: str
    row: Mapping[str, Any]


def prompt_of(
    example: Arrays, config: TrainConfig, prepared: Dataset, sequence_length: int
) -> Prompt:
    """The prompt of an example of the data, a pair of a prompt and its answer.

    It is encoded as `generate` encodes prompts: names of special tokens are these tokens, and a
    start token in the text is not repeated. Raises UserError for other data, and for a prompt that
    is too long.
    """
    objective, tokenizer = config.objective, required_tokenizer(prepared)
    assert isinstance(objective, PolicyObjective) and isinstance(config.model, TextConfig)
    if "source_tokens" not in example:
        raise UserError(
            f"objective {type(objective).__name__} needs prompts with answers; set data.source to "
            "a PairSource"
        )
    text, answer = (tokenizer.decode(example[f"{side}_tokens"]) for side in ("source", "target"))
    further = {
        name: array.item() if array.ndim == 0 else array.tolist()
        for name, array in example.items()
        if not name.endswith(("_tokens", "_ends"))
    }
    frame = prompt_frame(tokenizer, config.model)
    ids = np.array(with_frame(frame, tokenizer.encode_prompt(text).tolist()), np.int32)
    length = objective.prompt_length(sequence_length)
    if len(ids) > length:
        raise UserError(
            f"the prompt {text[:40]!r} has {len(ids)} tokens, of which phases.sequence_length "
            f"{sequence_length} and objective.rollouts.completion_length leave {length}; set one "
            "of them, or leave the prompt out"
        )
    return Prompt(ids, text, {"prompt": text, "answer": answer, **further})


@dataclass(frozen=True)
class Completions:
    """Completions of prompts: their tokens, with the end token if they have one, and texts."""

    ids: Sequence[np.ndarray]
    ended: np.ndarray
    """Whether each has an end token, bool [R]; else it is truncated."""
    texts: Sequence[str]


class Sampler:
    """Samples completions with a model on its mesh, ``rows`` at a time.

    Rows are divided over the data axes of the mesh. One program is compiled, for any prompts of up
    to ``prompt_length`` tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        tokenizer: Tokenizer,
        vocabulary: Vocabulary,
        *,
        rows: int,
        prompt_length: int,
        completion_length: int,
    ) -> None:
        self._model, self._mesh, self._tokenizer = model, mesh, tokenizer
        self._rows, self._length = rows, prompt_length
        own = settings_of(model).eos_ids or getattr(model.config, "eos_ids", ())
        self._ends = sorted({end_id(vocabulary), *own, *_ends_of_turns(tokenizer)})
        self._pad = vocabulary.pad_id
        endings = Endings.of(self._ends, self._pad)
        self._limits = TextLimits(endings, jnp.int32(completion_length))

    def __call__(
        self, params: Any, prompts: Sequence[Prompt], sampling: Sampling, key: jax.Array
    ) -> Completions:
        """One completion of each prompt; equal for equal parameters, prompts and key."""
        tokens: list[np.ndarray] = []
        for number, first in enumerate(range(0, len(prompts), self._rows)):
            some = prompts[first : first + self._rows]
            filled = [*some, *[some[-1]] * (self._rows - len(some))]
            found = self._tokens(params, filled, sampling, jax.random.fold_in(key, number))
            tokens.extend(found[: len(some)])
            watchdog.progress()
        ids, ended = [], []
        for row in tokens:
            ends = np.flatnonzero(np.isin(row, self._ends))
            ended.append(len(ends) > 0)
            ids.append(row[: ends[0] + 1] if len(ends) else row)
        texts = [
            self._tokenizer.decode(row[:-1] if end else row)
            for row, end in zip(ids, ended, strict=True)
        ]
        return Completions(ids, np.array(ended), texts)

    def _tokens(
        self, params: Any, prompts: Sequence[Prompt], sampling: Sampling, key: jax.Array
    ) -> np.ndarray:
        """New tokens int32 [rows, completion length]."""
        ids_BT = np.full((self._rows, self._length), self._pad, np.int32)
        mask_BT = np.zeros_like(ids_BT)
        for row, prompt in enumerate(prompts):
            first = self._length - len(prompt.ids)
            ids_BT[row, first:], mask_BT[row, first:] = prompt.ids, 1
        sharding = batch_sharding(self._mesh)
        ids, mask = (
            jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
            for array in (ids_BT, mask_BT)
        )
        request = GenerationRequest(ids, mask, self._limits, key)
        with nn.logical_axis_rules(RULES):
            tokens = generate(self._model, params, request, sampling, NO_SETTINGS, None)
        return np.asarray(tokens)


def _ends_of_turns(tokenizer: Tokenizer) -> list[int]:
    """The special token that ends an answer in the chat template of a tokenizer, if there is one,
    as in `chat`. A warning says where a template does not tell it."""
    if template_in_files(tokenizer) is None:
        return []
    try:
        token = end_of_turn_id(template_of(tokenizer), tokenizer)
    except (TemplateError, UserError) as error:  # prompts may do without it
        log.warning("completions do not end at the end of a turn: %s", error)
        return []
    return [] if token is None else [token]


class RewardScorer:
    """Scores completions by the rewards of an objective.

    In a job of several processes the first one scores, and all get its results.
    """

    def __init__(self, rewards: Sequence[Reward], mesh: Mesh) -> None:
        self.names = reward_names(rewards)
        self._rewards = rewards
        self._scorers: list[Scorer] = [reward.scorer(mesh) for reward in rewards]
        self.weights = np.array([reward.weight for reward in rewards])

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> np.ndarray:
        """float64 [R, rewards], not weighted.

        Raises AgreedError for a reward that fails; see `checked_scores`."""
        texts, rows = [p.text for p in prompts], [p.row for p in prompts]
        found = np.full((len(completions), len(self._rewards)), np.nan)
        failed: UserError | None = None
        for place, (reward, scorer) in enumerate(zip(self._rewards, self._scorers, strict=True)):
            if jax.process_index() == 0 or reward.on_all_processes:
                try:
                    found[:, place] = checked_scores(reward, scorer, texts, completions, rows)
                except UserError as error:
                    failed = error
            if jax.process_count() > 1:
                wait_for_scores(reward)
            # Before the next reward, which all processes may compute together.
            works = multihost_utils.process_allgather(np.array(failed is None))
            if failed is not None:
                raise AgreedError(str(failed)) from failed
            if not np.all(works):
                raise AgreedError(
                    f"the reward {reward.name} failed in another process, which says how"
                )
        if jax.process_count() > 1:  # as bytes: JAX would round to float32
            raw = np.asarray(multihost_utils.broadcast_one_to_all(found.view(np.uint32)))
            found = raw.view(np.float64)
        return found


Scorers = dict[Mesh, RewardScorer]
"""The rewards of a run by mesh, which its rollouts and evaluators share: models among them are
loaded once."""


def scorer_on(mesh: Mesh, rewards: Sequence[Reward], scorers: Scorers) -> RewardScorer:
    """The scorer of a mesh, loaded if it is not among the ``scorers`` yet."""
    if mesh not in scorers:
        scorers[mesh] = RewardScorer(rewards, mesh)
    return scorers[mesh]


def batch_source(
    config: TrainConfig, initial: Callable[[Mesh], Any] | None, scorers: Scorers
) -> OnlineBatches | None:
    """Where the batches of a run come from, if not from its data: ``online`` of `train_prepared`.

    ``initial`` gives, on a mesh, the parameters that the run starts from and the reference keeps;
    None: they are drawn. ``scorers``: those of the run.
    """
    if not isinstance(config.objective, PolicyObjective):
        return None
    return partial(rollout_batches, initial, scorers)


@contextlib.contextmanager
def rollout_batches(
    initial: Callable[[Mesh], Any] | None,
    scorers: Scorers,
    run: Run,
    position: RunPosition,
    state: Callable[[], TrainState],
) -> Iterator[Iterator[tuple[dict[str, jax.Array], np.ndarray]]]:
    """Batches of the phase at ``position``, which the loop moves along, with the numbers of their
    prompts; ``state`` gives that of the last step."""
    with watchdog.phase("first_batch"):
        source = _Rollouts(initial, scorers, run, position, state)
    yield source.batches()


class _Rollouts:
    """The rollouts of one phase of a run."""

    def __init__(
        self,
        initial: Callable[[Mesh], Any] | None,
        scorers: Scorers,
        run: Run,
        position: RunPosition,
        state: Callable[[], TrainState],
    ) -> None:
        objective, phase = run.config.objective, run.config.phases[position.phase]
        assert isinstance(objective, PolicyObjective)
        self._run, self._position, self._state = run, position, state
        self._objective: PolicyObjective = objective
        self._settings = objective.rollouts
        self._batch, self._length = phase.batch_size, phase.sequence_length
        if self._size % self._settings.group_size:
            raise UserError(
                f"a rollout has {self._size} rows (phases.batch_size times "
                f"objective.rollouts.batches), which does not divide by "
                f"objective.rollouts.group_size {self._settings.group_size}; change one of them"
            )
        self._vocabulary = run.prepared.vocabulary
        self._examples = training_examples(
            run.prepared,
            objective.window_spec(phase.sequence_length),
            run.config.data,
            run.config.seed,
        )
        self._key = key_of("train", (run.config.seed, position.phase))
        self._sampler = Sampler(
            run.trainer.model,
            run.mesh,
            required_tokenizer(run.prepared),
            self._vocabulary,
            rows=self._batch,
            prompt_length=objective.prompt_length(self._length),
            completion_length=self._settings.completion_length,
        )
        self._scorer = scorer_on(run.mesh, self._settings.rewards, scorers)
        self._sharding = batch_sharding(run.mesh)
        self._rows = host_rows(self._sharding, self._batch)
        self._folder = run.workdir / "rollouts"
        self._check_prompts()
        self._reference = self._reference_parameters(initial)
        self._measure = compiled_together(self._compiled_measure())
        placed = jax.tree.map(lambda leaf: undivided(leaf.sharding), run.trainer.abstract_params)
        self._gathered = compiled_together(jax.jit(lambda params: params, out_shardings=placed))

    @property
    def _size(self) -> int:
        """Rows of a rollout, R."""
        return self._batch * self._settings.batches

    def _check_prompts(self) -> None:
        """Notes the number of prompts of the phase, on which their order depends.

        Raises UserError, in all processes, if the phase began with another number.
        """
        run, resumed = self._run, self._position.examples > 0
        file = self._folder / f"prompts_{self._position.phase}.txt"
        found, known = str(len(self._examples)), read_side_file(file)
        fault = None
        if resumed and known is not None and known.strip() != found:
            fault = UserError(
                f"{run.prepared.directory} gives {found} prompts to phases.{self._position.phase}, "
                f"which began with {known.strip()} ({file}), so that the run would go on with "
                "other ones; restore the data and objective it began with, or choose another "
                "--workdir"
            )
        raise_together(fault, "found another number of prompts than when the phase began")
        if resumed and known is None:
            self._compare_last_prompts()
        if run.is_writer and (known or "").strip() != found:
            write_side_file(file, found + "\n")

    def _compare_last_prompts(self) -> None:
        """Warns if the last rollout has other prompts than the data give for it now: a run of an
        earlier version noted no number of prompts."""
        last = self._position.examples // self._batch - 1
        rollout, step = divmod(last, self._settings.steps)
        file = self._folder / f"step_{self._position.step - 1 - step:08d}.jsonl"
        text = read_side_file(file)
        if text is None or self._position.rollbacks:  # which leave out examples, but no steps
            return
        try:
            known = [json.loads(line)["prompt"] for line in text.split("\n") if line]
        except (ValueError, LookupError, TypeError):
            return
        if known != [prompt.text for prompt in self._prompts(rollout)[0]]:
            log.warning(
                "the prompts of %s are not those that the data give for it now, as after a change "
                "of which prompts are left out; the rest of the run has them in another order, so "
                "that some are repeated and others left out", file,
            )  # fmt: skip

    def batches(self) -> Iterator[tuple[dict[str, jax.Array], np.ndarray]]:
        held, sampled_at = -1, 0
        arrays: Arrays = {}
        while True:
            place = self._position.examples // self._batch
            rollout, step = divmod(place, self._settings.steps)
            if rollout != held:
                with watchdog.phase("data"):
                    stored = self._stored(rollout) if step else None
                    self._run.clock.lap("data_wait")
                    sampled_at, arrays = stored or self._sampled(rollout)
                    self._run.clock.lap("rollouts")
                held = rollout
            first = step % self._settings.batches * self._batch
            batch = {name: array[first : first + self._batch] for name, array in arrays.items()}
            age = self._position.step - sampled_at
            batch[f"{STATISTICS}off_policy_steps"] = np.full(self._batch, age, np.float32)
            yield self._placed(batch), batch["example_id"][self._rows]

    def _placed(self, batch: Arrays) -> dict[str, jax.Array]:
        local = {name: array[self._rows] for name, array in batch.items() if name != "example_id"}
        return place_rows(local, self._rows, self._sharding, self._batch)

    def _prompts(self, rollout: int) -> tuple[list[Prompt], np.ndarray]:
        """The prompt of each row, and the number of its example; a group is of one prompt."""
        groups = self._size // self._settings.group_size
        prompts, numbers = [], []
        for position in range(rollout * groups, (rollout + 1) * groups):
            _, number = self._examples.locate(position, self._key)
            example = self._examples.read(number, np.random.default_rng(number))
            prompt = prompt_of(example, self._run.config, self._run.prepared, self._length)
            prompts += [prompt] * self._settings.group_size
            numbers += [number] * self._settings.group_size
        return prompts, np.array(numbers, np.int64)

    def _sampled(self, rollout: int) -> tuple[int, Arrays]:
        """The step, and the arrays [R, ...] of a rollout of the current parameters."""
        step, state = self._position.step, self._state()
        params = self._run.trainer.model_params(state, averaged=False)
        prompts, numbers = self._prompts(rollout)
        key = jax.random.fold_in(jax.random.key(self._run.config.seed), _STREAM)
        key = jax.random.fold_in(key, step)
        sampled_by = self._gathered(params) if self._settings.gather_weights else params
        completions = self._sampler(sampled_by, prompts, self._settings.sampling, key)
        del sampled_by
        length = self._settings.completion_length
        rows = stacked(
            [
                completion_row(prompt.ids, ids, self._vocabulary, self._length, length)
                for prompt, ids in zip(prompts, completions.ids, strict=True)
            ]
        )
        if self._settings.mask_truncated:
            rows["label_weights"] *= completions.ended[:, None]
        rows |= self._measured(params, state, rows)
        scores = self._scorer(prompts, completions.texts)
        rewards = scores @ self._scorer.weights
        rows |= self._objective.advantages(rewards, rows)
        rows |= self._statistics(scores, rewards, completions)
        rows["example_id"] = numbers
        self._store(rollout, step, rows, prompts, completions, scores)
        return step, rows

    def _measured(self, params: Any, state: TrainState, rows: Arrays) -> Arrays:
        """What the models of the sampling and of the reference say of the rows: arrays [R, ...]."""
        models = {"old": params} if self._objective.needs_old else {}
        if self._objective.needs_reference:
            reference = self._reference
            models["reference"] = base_of(state.variables) if reference is None else reference
        found: list[Arrays] = []
        for first in range(0, self._size, self._batch):
            batch = self._placed({n: a[first : first + self._batch] for n, a in rows.items()})
            measured = {name: self._measure(own, batch) for name, own in models.items()}
            found.append(
                {
                    f"{name}_{what}": np.asarray(array)
                    for name, arrays in measured.items()
                    for what, array in arrays.items()
                }
            )
        return {name: np.concatenate([part[name] for part in found]) for name in found[0]}

    def _compiled_measure(self) -> Any:
        """``(params, batch) -> arrays`` [B, ...] of ``objective.measured``, on all devices."""
        functions, objective = self._run.trainer.functions, self._objective

        def measure(params: Any, batch: Any) -> dict[str, jax.Array]:
            with nn.logical_axis_rules(RULES):
                return objective.measured(functions, params, batch)

        placed = jax.tree.map(lambda leaf: leaf.sharding, self._run.trainer.abstract_params)
        mesh = self._run.mesh
        return jax.jit(
            measure,
            in_shardings=(placed, self._sharding),
            out_shardings=replicated(mesh),
        )

    def _statistics(
        self, scores: np.ndarray, rewards: np.ndarray, completions: Completions
    ) -> Arrays:
        """What is logged of each row, float32 [R]."""
        groups = rewards.reshape(-1, self._settings.group_size)
        std = np.repeat(groups.std(axis=1, ddof=min(1, groups.shape[1] - 1)), groups.shape[1])
        same = np.repeat((groups == groups[:, :1]).all(axis=1), groups.shape[1])
        found = {
            "reward": rewards,
            "reward_std": std,
            "no_signal": same,
            "completion_length": np.array([len(ids) for ids in completions.ids]),
            "truncated": ~completions.ended,
        } | dict(zip(self._scorer.names, scores.T, strict=True))
        return {f"{STATISTICS}{name}": np.asarray(a, np.float32) for name, a in found.items()}

    def _reference_parameters(self, initial: Callable[[Mesh], Any] | None) -> Any:
        """Those that training started from; None without a reference, and with adapters where it
        is their base, that is, all that logits depend on but the adapters is frozen.

        Raises UserError if they are not those that a run with a checkpoint began with.
        """
        trainer = self._run.trainer
        is_base = base_keeps_logits(trainer.adapters, trainer.model)
        if not self._objective.needs_reference or is_base:
            return None
        with watchdog.phase("restore"):
            if initial is None:
                params = base_of(trainer.init(self._run.config.seed).variables)
            else:
                params = initial(self._run.mesh)
            found = f"{int(jax.jit(_checksum)(params)):08x}"
        file = self._folder / "reference.txt"
        known = (read_side_file(file) or "").strip()
        if known and known != found and has_checkpoint(self._run.workdir):
            raise UserError(
                f"the reference, {self._run.config.init_from or 'the initial parameters'}, has "
                f"other values than when the run began (checksum {found}, {file} has "
                f"{known}); restore it, or choose another --workdir"
            )
        if known != found and self._run.is_writer:
            write_side_file(file, found + "\n")
        return params

    def _store(
        self,
        rollout: int,
        step: int,
        rows: Arrays,
        prompts: Sequence[Prompt],
        completions: Completions,
        scores: np.ndarray,
    ) -> None:
        if not self._run.is_writer:
            return
        advantages = rows["advantages"].reshape(len(prompts), -1).mean(axis=1)
        lines = [
            {
                "prompt": prompt.text,
                "completion": completions.texts[row],
                "ended": bool(completions.ended[row]),
                "rewards": dict(zip(self._scorer.names, scores[row].tolist(), strict=True)),
                "advantage": float(advantages[row]),
            }
            for row, prompt in enumerate(prompts)
        ]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_side_file(self._folder / f"step_{step:08d}.jsonl", text)
        if self._settings.steps == 1:
            return  # no run resumes within it
        content = io.BytesIO()
        place: Any = {"place": np.array([self._position.phase, rollout])}
        np.savez(content, **rows | place)
        file = self._folder / f"step_{step:08d}.npz"
        with writing(file):
            file.write_bytes(content.getvalue())
        files = sorted(self._folder.glob("step_*.npz"))
        # Later ones are of a run that went further before it returned to a checkpoint.
        known = [one for one in files if one.name <= file.name]
        for old in (*files[len(known) :], *known[: -self._settings.kept]):
            old.unlink(missing_ok=True)

    def _stored(self, rollout: int) -> tuple[int, Arrays] | None:
        """The step and the arrays of a rollout that a run resumes in, or None if it is missing."""
        for age in range(1, self._settings.steps):
            step = self._position.step - age
            rows = _read_arrays(self._folder / f"step_{step:08d}.npz")
            place = rows.pop("place", np.array([])).tolist()
            if place == [self._position.phase, rollout] and len(rows["labels"]) == self._size:
                log.info("resuming in the rollout of step %d", step)
                return step, rows
        log.warning(
            "the rollout in which the run resumes is not in %s; new completions are sampled",
            self._folder,
        )
        return None


def undivided(sharding: NamedSharding) -> NamedSharding:
    """``sharding`` without the mesh axis ``fsdp``."""

    def kept(axis: str | tuple[str, ...] | None) -> tuple[str, ...] | None:
        names = () if axis is None else (axis,) if isinstance(axis, str) else axis
        return tuple(name for name in names if name != "fsdp") or None

    return NamedSharding(sharding.mesh, PartitionSpec(*map(kept, sharding.spec)))


def _read_arrays(file: epath.Path) -> Arrays:
    """The arrays of a file; empty if it is missing or damaged."""
    try:
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as found:
            return dict(found)
    except FileNotFoundError:
        return {}
    except Exception as error:  # each damage to a zip archive has an error of its own
        log.warning("%s cannot be read (%s)", file, error)
        return {}


def required_tokenizer(prepared: Dataset) -> Tokenizer:
    """The tokenizer of the data. Raises UserError if there is none."""
    if prepared.tokenizer is None:
        raise UserError("rewards are given texts; give the data a tokenizer")
    return prepared.tokenizer


def _checksum(params: Any) -> jax.Array:
    """A sum of the bits of all values, uint32, which no sharding changes."""
    total = jnp.uint32(0)
    for number, leaf in enumerate(jax.tree.leaves(params), 1):
        bits = jax.lax.bitcast_convert_type(leaf.astype(jnp.float32), jnp.uint32)
        place = jax.lax.iota(jnp.uint32, bits.size).reshape(bits.shape)
        total += jnp.uint32(number) * jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)
    return total
