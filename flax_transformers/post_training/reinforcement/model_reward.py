"""A reward model as the source of rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from flax_transformers import ranges
from flax_transformers.data.pipeline.loader import stacked
from flax_transformers.data.tokenizers.load import Tokenizer
from flax_transformers.errors import UserError
from flax_transformers.generation.buckets import bucket
from flax_transformers.models.config import TextConfig
from flax_transformers.objectives.rows import pad
from flax_transformers.parallel.rules import RULES, batch_sharding, place_rows, replicated
from flax_transformers.post_training.chat_data import encode
from flax_transformers.post_training.chat_template import (
    ChatTemplate,
    Message,
    TemplateError,
    template_in_files,
    template_of,
)
from flax_transformers.post_training.conversations import Conversation, Turns
from flax_transformers.post_training.reinforcement.rewards import Reward, Rows, Scorer, Texts
from flax_transformers.post_training.reward_model import rewards
from flax_transformers.restore import restore_model
from flax_transformers.training.step import model_functions


@dataclass(frozen=True, kw_only=True)
class ModelReward(Reward):
    """The number that a reward model gives to prompt and completion (``RewardModel``).

    It reads them in its own tokenizer, which may be another than that of the policy, in the form in
    which ``RewardModel`` was trained; see ``messages``.
    """

    path: str
    """Workdir or checkpoint of a reward model, or of one that ``convert`` has read: a sequence
    classifier with one label."""
    messages: bool | None = None
    """Whether the reward model was trained on messages: prompt and completion are then the turns of
    a user and an assistant in the chat template beside its tokenizer; a prompt that this template
    has rendered, up to the beginning of an answer, is not rendered again. Otherwise they are one
    text between its start and end tokens. Needed if there is a template, which does not say
    which."""
    batch_size: int = 64
    """Completions that are scored at once."""
    time_limit_s: float = 600.0

    on_all_processes: ClassVar[bool] = True
    RANGES: ClassVar[ranges.Ranges] = {"batch_size": ranges.EXAMPLES}

    def scorer(self, mesh: Mesh) -> Scorer:
        """The restored model. Raises UserError if it is none, or has several labels."""
        restored = restore_model(self.path, mesh)
        config, tokenizer = restored.model_config, restored.tokenizer
        if tokenizer is None or config.num_labels != 1 or not hasattr(restored.model, "classify"):
            raise UserError(
                f"{self.path} holds a {config.architecture} with {config.num_labels} labels; a "
                "reward model is a sequence classifier with one"
            )
        if self.messages is None and template_in_files(tokenizer) is not None:
            raise UserError(
                f"the tokenizer in {self.path} has a chat template; set messages of ModelReward to "
                "true if the reward model was trained on messages, or to false for plain texts"
            )
        template = template_of(tokenizer) if self.messages else None
        size = -(-self.batch_size // mesh.size) * mesh.size
        return _Model(restored.model, restored.params, mesh, tokenizer, template, size)


class _Model:
    """Scores texts with a model on a mesh, ``size`` at a time."""

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        mesh: Mesh,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        size: int,
    ) -> None:
        self._template = template
        self._params, self._mesh, self._size = params, mesh, size
        self._tokenizer, self._config = tokenizer, model.config
        functions = model_functions(model)

        def score(params: Any, batch: Mapping[str, jax.Array]) -> jax.Array:
            with nn.logical_axis_rules(RULES):
                return rewards(functions, params, batch)[:, 0]

        placed = jax.tree.map(lambda leaf: leaf.sharding, params)
        self._score = jax.jit(
            score,
            in_shardings=(placed, batch_sharding(mesh)),
            out_shardings=replicated(mesh),
        )

    def __call__(self, prompts: Texts, completions: Texts, rows: Rows) -> list[float]:
        ids = [self._ids(p, c) for p, c in zip(prompts, completions, strict=True)]
        found: list[float] = []
        for first in range(0, len(ids), self._size):
            some = ids[first : first + self._size]
            filled = some + some[-1:] * (self._size - len(some))
            found += self._scores(filled)[: len(some)]
        return found

    def _ids(self, prompt: str, completion: str) -> list[int]:
        try:
            ids = self._encoded(prompt, completion)
        except TemplateError as error:
            raise UserError(f"the reward model cannot read a completion: {error}") from error
        assert isinstance(self._config, TextConfig)
        limit = self._config.length_limit
        if limit is not None and len(ids) > limit:
            raise UserError(
                f"a completion with its prompt has {len(ids)} tokens, but the reward model takes "
                f"{limit}; shorten completions, or use another reward model"
            )
        return ids

    def _encoded(self, prompt: str, completion: str) -> list[int]:
        """Raises `TemplateError`."""
        turns: tuple[Turns, Turns] = (prompt, completion)
        if self._template is not None:
            if (text := self._template.answered(prompt, completion)) is not None:
                rendered: list[int] = self._tokenizer.encode_prompt(text).tolist()
                return rendered
            question: Message = {"role": "user", "content": prompt}
            turns = (question,), ({"role": "assistant", "content": completion},)
        document = Conversation((), prompt=turns[0], completions=turns[1:])
        (found,), _ = encode(document, self._template or ChatTemplate(), self._tokenizer)
        ids: list[int] = found.tolist()
        return ids

    def _scores(self, ids: Sequence[Sequence[int]]) -> list[float]:
        longest = max(map(len, ids))
        length = bucket(longest)
        if self._config.length_limit is not None:
            length = min(length, self._config.length_limit)
        batch = stacked(
            [
                {
                    "input_ids": pad(np.array(row), length, self._config.filler_id),
                    "segment_ids": pad(np.ones(len(row), np.int32), length, 0),
                    "ends": np.array([len(row)], np.int32),
                }
                for row in ids
            ]
        )
        sharding = batch_sharding(self._mesh)
        with jax.set_mesh(self._mesh):  # rewards are computed in a thread of their own
            placed = place_rows(batch, np.arange(self._size), sharding, self._size)
            return np.asarray(self._score(self._params, placed), np.float64).tolist()
