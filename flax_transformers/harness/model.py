"""Models of this package in EleutherAI's lm-evaluation-harness (extra ``lm-eval``).

From Python, ``lm_eval.simple_evaluate(model=HarnessModel("runs/x"), tasks=[...])``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from flax_transformers.data.tokenizers.fitting import fitted_vocabulary
from flax_transformers.errors import UserError
from flax_transformers.evaluation.prediction.examples import predictions
from flax_transformers.evaluation.scoring.continuations import (
    Continuation,
    ContinuationLikelihood,
    Requests,
    check_requests,
    request_of,
)
from flax_transformers.generation.decode import generate, require_positions, require_writer
from flax_transformers.generation.program import arranged
from flax_transformers.generation.prompts import (
    end_ids,
    noted_frame,
    require_known,
    rows_of,
    special_stops,
    token_texts,
    until_stop,
)
from flax_transformers.generation.stop_strings import StopStrings
from flax_transformers.objectives.base import Frame
from flax_transformers.objectives.rows import document_start
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.pretrained import load_pretrained, load_tokenizer
from flax_transformers.ranges import parse_integer
from flax_transformers.restore import RestoredModel

_MAX_LENGTH = 2048
"""Largest number of tokens if the model has no limit."""
_NEW_TOKENS = 256
"""Number of new tokens if a task does not say (lm_eval's own default)."""


@register_model("flax_transformers")
class HarnessModel(LM):
    """A causal language model, for tasks of log-likelihoods, of perplexity and of generation.

    ``pretrained``: what ``load_pretrained`` takes. ``batch_size``: number of texts that are
    computed at once, which divides over ``mesh``. ``max_length``: number of tokens that the model
    reads, by default all that it has positions for. ``device`` and ``max_batch_size``, which
    lm_eval's command passes, are not used.

    Raises UserError for a model that does not continue texts, and for one without a tokenizer.
    """

    def __init__(
        self,
        pretrained: str,
        batch_size: int | str = 16,
        max_length: int | None = None,
        mesh: MeshConfig | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        placed = make_mesh(mesh or MeshConfig())
        model, params = load_pretrained(pretrained, mesh=placed)
        require_writer(model)
        self._config: Any = model.config
        self._tokenizer = load_tokenizer(pretrained)
        self._restored = RestoredModel(
            self._config, model, params, self._tokenizer, None, placed, step=0
        )
        numbers = {"batch_size": batch_size}
        if max_length is not None:
            numbers["max_length"] = max_length
        for name, value in numbers.items():
            if (parse_integer(str(value)) or 0) < 1:
                raise UserError(f"{name} is {value!r}; give a number from 1")
        self._batch_size = int(batch_size)
        self._length = int(max_length or self._config.max_positions or _MAX_LENGTH)
        require_positions(model, self._length, f"{self._length} tokens of max_length")
        self._before = list((noted_frame(self._tokenizer) or Frame()).before)

    @property
    def tokenizer_name(self) -> str:
        return self._tokenizer.fingerprint

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The log-likelihood in nats of each continuation of a context, and whether greedy decoding
        would give it."""
        return self._scores([self._request(*one.args) for one in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """The log-likelihood in nats of each text, every token of which is scored once: a text that
        is too long in windows, as lm_eval divides it."""
        windows: list[Continuation] = []
        counts: list[int] = []
        for one in requests:
            (text,) = one.args
            ids = self._tokenizer.encode_batch([text])[0].tolist()
            found = get_rolling_token_windows(
                token_list=ids,
                prefix_token=self._first_id(),
                max_seq_len=self._length,
                context_len=1,
            )
            some = [Continuation(*make_disjoint_window(window)) for window in found]
            windows += some
            counts.append(len(some))
        scores = iter(self._scores(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The text after each context, up to a stop string: greedy, unless the task sets a
        temperature."""
        texts: dict[int, str] = {}
        alike: dict[str, list[int]] = {}  # requests by their settings
        for number, one in enumerate(requests):
            alike.setdefault(repr(sorted(one.args[1].items())), []).append(number)
        with jax.set_mesh(self._restored.mesh):
            params = arranged(self._restored.params)
            for numbers in alike.values():
                settings = requests[numbers[0]].args[1]
                for start in range(0, len(numbers), self._batch_size):
                    some = numbers[start : start + self._batch_size]
                    contexts = [requests[number].args[0] for number in some]
                    # Requests for several samples of a prompt are in different batches.
                    key = jax.random.fold_in(jax.random.key(0), some[0])
                    written = self._written(params, contexts, settings, key)
                    texts |= dict(zip(some, written, strict=True))
        return [texts[number] for number in range(len(requests))]

    def _first_id(self) -> int:
        return self._before[0] if self._before else document_start(self._tokenizer.vocabulary)

    def _request(self, context: str, continuation: str) -> Continuation:
        if context:
            return request_of(self._tokenizer, context, continuation, self._before)
        ids = self._tokenizer.encode_batch([continuation])[0].tolist()
        first = self._first_id()
        return Continuation(ids[:1], ids[1:]) if ids[:1] == [first] else Continuation([first], ids)

    def _scores(self, requests: Sequence[Continuation]) -> list[tuple[float, bool]]:
        check_requests(requests, self._length, "request")
        ids = {token for one in requests for token in (*one.context, *one.continuation)}
        require_known(self._tokenizer, ids, self._config.vocab_size, "task")
        both_ways = bool(self._config.generation.bidirectional_prompt)
        objective: Any = ContinuationLikelihood(both_ways)
        size = self._config.vocab_size
        found = predictions(
            Requests(requests),
            objective,
            self._restored,
            fitted_vocabulary(self._tokenizer.vocabulary, size, self._config.pad_id, size),
            self._length,
            self._batch_size,
        )
        return [(float(one["log_likelihood"][0]), bool(one["greedy"][0])) for one in found]

    def _written(
        self, params: Any, contexts: Sequence[str], settings: dict[str, Any], key: jax.Array
    ) -> Iterator[str]:
        """The texts after ``contexts``, at most as many as a batch."""
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else [stop for stop in stops if stop]
        special, stops = special_stops(self._tokenizer, stops)
        new_tokens = int(settings.get("max_gen_toks", _NEW_TOKENS))
        if new_tokens >= self._length:
            raise UserError(
                f"a task writes {new_tokens} tokens, but the model has {self._length} positions; "
                "set max_gen_toks lower"
            )
        tokenizer, kept = self._tokenizer, self._length - new_tokens
        prompts = [
            [*self._before, *tokenizer.encode_prompt(context).tolist()][-kept:]
            or [self._first_id()]
            for context in contexts
        ]
        rows = prompts + [prompts[-1]] * (self._batch_size - len(prompts))  # one shape
        ids, mask = rows_of(rows, self._config.filler_id)
        sampled = bool(settings.get("do_sample", settings.get("temperature", 0.0)))
        ends = end_ids(tokenizer, self._config) | {*special}
        written = generate(
            self._restored.model,
            params,
            ids,
            mask,
            max_new_tokens=new_tokens,
            eos_id=sorted(ends),
            temperature=float(settings.get("temperature", 1.0)) if sampled else 0.0,
            top_k=settings.get("top_k"),
            top_p=settings.get("top_p"),
            key=key,
            stops=StopStrings.of(stops, self._token_texts, rows) if stops else None,
        )
        for prompt, row in zip(prompts, jax.device_get(written).tolist(), strict=False):
            end = next((place for place, token in enumerate(row) if token in ends), len(row))
            before = len(tokenizer.decode(prompt))
            yield until_stop(tokenizer.decode([*prompt, *row[:end]]), before, stops)[before:]

    @cached_property
    def _token_texts(self) -> list[str]:
        return token_texts(self._tokenizer)
