"""``flax-transformers chat`` and ``arena``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional

from flax_transformers.cli.generate import Generate
from flax_transformers.cli.parsing import Flag, Model, number, option, override
from flax_transformers.errors import UserError
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.ranges import EXAMPLES, INT32, POSITIONS, check_text, integers, numbers

if TYPE_CHECKING:
    import numpy as np

    from flax_transformers.data.tokenizers.load import Tokenizer
    from flax_transformers.post_training.chat_template import ChatTemplate, Message

Template = Annotated[str | None, option("FILE")]
NewTokens = Annotated[int, number("--max-new-tokens", POSITIONS), option()]
Temperature = Annotated[float | None, number("--temperature", numbers(0, 1e6)), option()]
Seed = Annotated[int, number("--seed", integers(0, INT32))]


@dataclass(frozen=True)
class Asked:
    """A conversation that ends with a message to answer. ``tools``: for the template."""

    messages: Sequence[Message]
    tools: Any = None

    def answered(self, text: str) -> list[Message]:
        """The messages with an answer."""
        return [*self.messages, {"role": "assistant", "content": text}]


@dataclass(frozen=True)
class Chat:
    """Talk to a language model in the terminal, by its chat template.

    An empty line ends the conversation, and /new begins another one. --mesh.tensor 4 (also
    --mesh.fsdp and --mesh.expert) shards the model; --compute.dtype and its neighbours set how it
    is computed.
    """

    model: Model
    system: Annotated[str | None, option("TEXT")] = None
    """The first message, which says how to answer."""
    template: Template = None
    """A chat template in Jinja; by default that of the tokenizer, or else ChatML."""
    max_new_tokens: NewTokens = 512
    """Largest number of tokens of an answer."""
    temperature: Temperature = None
    """Sampling temperature; 0 decodes greedily (0 without a setting of the model)."""
    seed: Seed = 0
    """Seed of sampling."""

    def run(self, overrides: Sequence[str]) -> int:
        settings = self.max_new_tokens, self.temperature, self.seed
        chat_model = ChatModel(self.model, self.template, *settings)
        chat_model.load(overrides)
        system: list[Message] = []
        if self.system is not None:
            system = [{"role": "system", "content": self.system}]
        messages = list(system)
        for line in _lines("> "):
            if line == "/new":
                messages = list(system)
                continue
            messages.append({"role": "user", "content": line})
            answer = chat_model.answer(messages)
            messages.append({"role": "assistant", "content": answer})
        return 0


@dataclass(frozen=True)
class Arena:
    """Compare the answers of two models: a blind vote in the terminal, or a reward model's.

    The models answer the same prompts. Without --judge, both answers are shown in random order:
    1 or 2 is better, 0 is a tie, q ends the vote. Prints wins, and the Elo difference with its
    95 % interval, by bootstrap over prompts.
    """

    model: Model
    other: Positional[Annotated[str, option("OTHER", "The model to compare with.")]]
    prompts: Annotated[str, option("FILE")]
    """A text file with a question in each line, or a .jsonl file of conversations, whose last
    answer is left out, or of questions in a field "prompt"."""
    judge: Annotated[str | None, option("MODEL")] = None
    """A reward model that votes."""
    judge_texts: Flag = False
    """The reward model was trained on plain texts: it reads a question and its answer as one text,
    without a chat template, and so do the models unless there is a --template."""
    output: Annotated[str | None, option("FILE")] = None
    """Where prompts, answers and votes are written, as JSON lines; answers before a judge reads
    them, without their votes."""
    template: Template = None
    """A chat template in Jinja; by default that of each tokenizer, or else ChatML."""
    batch_size: Annotated[int, number("--batch-size", EXAMPLES)] = 16
    """Number of prompts that are answered at once."""
    max_new_tokens: NewTokens = 256
    """Largest number of tokens of an answer."""
    temperature: Temperature = None
    """Sampling temperature; 0 decodes greedily (0 without a setting of the model)."""
    seed: Seed = 0
    """Seed of sampling, and of the order in which answers are shown."""

    def run(self, overrides: Sequence[str]) -> int:
        import numpy as np

        from flax_transformers.post_training.judge import elo_difference

        conversations = _conversations(self.prompts)
        self._check(conversations, overrides)
        answers = [self._answers(model, conversations, overrides) for model in self._models]
        found: Iterable[float]
        if self.judge is not None:
            with self._kept(conversations, answers):
                found = self._judged(self.judge, conversations, answers)
        else:
            found = _votes(conversations, answers, np.random.default_rng(self.seed))
        votes = list(_noted(self.output, conversations, answers, found))
        if not votes:
            print("no votes")
            return 0
        wins = [votes.count(1.0), votes.count(0.0)]
        low, elo, high = elo_difference(np.array(votes), np.random.default_rng(self.seed))
        ties = len(votes) - sum(wins)
        print(f"{self.model}: {wins[0]} wins, {self.other}: {wins[1]} wins, {ties} ties")
        print(f"Elo of the first above the second: {elo:+.0f}, 95 % from {low:+.0f} to {high:+.0f}")
        return 0

    @property
    def _models(self) -> tuple[str, str]:
        return self.model, self.other

    def _check(self, conversations: Sequence[Asked], overrides: Sequence[str]) -> None:
        """Raises UserError for what is wrong, before a model is read or answers."""
        from flax_transformers.huggingface.family import build_model
        from flax_transformers.post_training.chat_template import template_of
        from flax_transformers.post_training.judge import check_judge
        from flax_transformers.pretrained import (
            describe_pretrained,
            find_pretrained,
            load_tokenizer,
        )

        with _opened(self.output, "a"):
            pass
        if self.judge_texts:
            self._check_texts(conversations)
        if self.judge is not None:
            check_judge(build_model(describe_pretrained(find_pretrained(self.judge))))
            template_of(load_tokenizer(self.judge), self.template)
        models = [self._chat_model(model) for model in self._models]
        for chat_model in models:
            chat_model.check(overrides)
            for asked in conversations:
                chat_model.encoded(asked.messages, asked.tools)
        if self.judge is not None:
            self._check_lengths(self.judge, conversations, models)

    def _check_lengths(
        self, judge: str, conversations: Sequence[Asked], models: Sequence[ChatModel]
    ) -> None:
        """The judge takes the longest conversation with an answer of a model that has the judge's
        tokenizer; how many tokens other answers have for the judge is not known before."""
        from flax_transformers.post_training.judge import judged_ids
        from flax_transformers.pretrained import describe_pretrained, find_pretrained

        limit = getattr(describe_pretrained(find_pretrained(judge)), "length_limit", None)
        if limit is None:
            return
        template, tokenizer = self._judge_template(judge)
        lengths = [  # without an answer, for which a token stands
            len(judged_ids(template, tokenizer, asked.answered("."), asked.tools)) - 1
            for asked in conversations
        ]
        longest = max(lengths)
        alike = any(model.tokenizer.fingerprint == tokenizer.fingerprint for model in models)
        if longest + (self.max_new_tokens if alike else 1) <= limit:
            return
        hint = "leave it out, or give another judge"
        if longest < limit:
            hint = f"set --max-new-tokens {limit - longest}, or {hint}"
        raise UserError(
            f"conversation {lengths.index(longest) + 1} of {self.prompts} has {longest} tokens "
            f"for the judge, which takes {limit} with the answer, of at most "
            f"{self.max_new_tokens}; {hint}"
        )

    def _judge_template(self, judge: str) -> tuple[ChatTemplate | None, Tokenizer]:
        """What the judge reads conversations by: its template, None for plain texts, and its
        tokenizer."""
        from flax_transformers.post_training.chat_template import template_of
        from flax_transformers.pretrained import load_tokenizer

        tokenizer = load_tokenizer(judge)
        return None if self.judge_texts else template_of(tokenizer, self.template), tokenizer

    def _check_texts(self, conversations: Sequence[Asked]) -> None:
        if self.judge is None:
            raise UserError("--judge-texts says how --judge reads answers; give both, or neither")
        for place, asked in enumerate(conversations, 1):
            roles = [one["role"] for one in asked.messages]
            if roles != ["user"] or not isinstance(asked.messages[0]["content"], str):
                raise UserError(
                    f"conversation {place} of {self.prompts} has the messages {', '.join(roles)}, "
                    "but with --judge-texts each is one question in text; leave it out"
                )

    def _chat_model(self, model: str) -> ChatModel:
        return ChatModel(
            model,
            self.template,
            self.max_new_tokens,
            self.temperature,
            self.seed,
            self.batch_size,
            plain=self.judge_texts and self.template is None,
        )

    def _answers(
        self, model: str, conversations: Sequence[Asked], overrides: Sequence[str]
    ) -> list[str]:
        """One model at a time is in memory."""
        chat_model = self._chat_model(model)
        chat_model.load(overrides)
        return chat_model.answers(conversations)

    @contextmanager
    def _kept(
        self, conversations: Sequence[Asked], answers: Sequence[Sequence[str]]
    ) -> Iterator[None]:
        """Writes the answers before a judge reads them, or prints them where it cannot and there is
        no file, so that they are not lost."""
        lines = [_line(*one, vote=None) for one in zip(conversations, *answers, strict=True)]
        with _opened(self.output, "w") as file:
            if file is not None:
                print(*lines, sep="\n", file=file)
        try:
            yield
        except UserError:
            if self.output is None:
                print(*lines, sep="\n")
            raise

    def _judged(
        self, judge: str, conversations: Sequence[Asked], answers: Sequence[list[str]]
    ) -> list[float]:
        from flax_transformers.post_training.judge import judged_ids, judged_rewards, votes_by
        from flax_transformers.pretrained import load_pretrained

        model, params = load_pretrained(judge)
        template, tokenizer = self._judge_template(judge)
        scores = []
        for of_model in answers:
            encoded = [
                judged_ids(template, tokenizer, asked.answered(text), asked.tools)
                for asked, text in zip(conversations, of_model, strict=True)
            ]
            scores.append(judged_rewards(model, params, encoded, self.batch_size))
        return votes_by(scores)


class ChatModel:
    """A model that answers conversations. Raises UserError for one that writes no text.

    ``plain``: it continues the text of the last message, as `generate` does, without a template.
    """

    def __init__(
        self,
        model: str,
        template: str | None,
        max_new_tokens: int,
        temperature: float | None,
        seed: int,
        batch_size: int = 1,
        *,
        plain: bool = False,
    ) -> None:
        self._model, self._template_path, self._plain = model, template, plain
        self._command = Generate(
            model=model,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )

    def check(self, overrides: Sequence[str]) -> None:
        """Reads all but the weights. ``overrides``: of the mesh and of how it is computed."""
        from flax_transformers import runtime
        from flax_transformers.parallel.mesh import make_mesh
        from flax_transformers.pretrained import describe_pretrained, find_pretrained

        options = override(runtime.ModelOptions(), overrides)
        runtime.start(None)
        watchdog.start(options.limits)
        self._mesh, self._compute = make_mesh(options.mesh), options.compute
        with watchdog.phase("restore"):
            self._found = find_pretrained(self._model)
            described = describe_pretrained(self._found, None)
            self._work = self._command.work_on(self._found, described, ())
            if not self._plain:
                self._end()

    def load(self, overrides: Sequence[str]) -> None:
        """Reads the model; ``overrides`` as for `check`."""
        from flax_transformers.generation.program import arranged
        from flax_transformers.pretrained import load_pretrained

        self.check(overrides)
        with watchdog.phase("restore"):
            model, params = load_pretrained(self._found, compute=self._compute, mesh=self._mesh)
            self._loaded = model, arranged(params)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of answers."""
        return self._work.prompts.written

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template."""
        from flax_transformers.post_training.chat_template import template_of

        return template_of(self.tokenizer, self._template_path)

    def _end(self) -> None:
        """What ends an answer: a special token of the template, or else its text."""
        from flax_transformers.generation.prompts import token_texts
        from flax_transformers.post_training.chat_template import end_of_turn_id

        work = self._work
        with _template_errors():
            end = self.template.end_of_turn()
            token = end_of_turn_id(self.template, work.prompts.written)
        if token is not None:
            work.eos_ids = (*work.eos_ids, token)
        elif end:
            work.stops = (*work.stops, end)
            work.token_texts = work.token_texts or token_texts(work.prompts.written)

    def encoded(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """The ids of a conversation with the beginning of an answer. Raises UserError for one that
        the template refuses, or that is too long."""
        from flax_transformers.objectives.rows import end_id

        work = self._work
        if self._plain:
            [plain] = work.checked([messages[-1]["content"]])
            return plain
        with _template_errors():
            text = self.template.render(messages, tools, answer_next=True)
        tokenizer = work.prompts.written
        ids: list[int] = tokenizer.encode_prompt(text).tolist()
        if work.answers and ids[-1:] != [end_id(tokenizer.vocabulary)]:
            ids.append(end_id(tokenizer.vocabulary))  # as SupervisedEncoderDecoder ends a source
        work.check([ids])
        return ids

    def answer(self, messages: Sequence[Message]) -> str:
        """The answer to a conversation, printed as it comes."""
        from flax_transformers.generation.beams import Beams
        from flax_transformers.generation.prompts import Typist

        work = self._work
        if isinstance(work.choice, Beams):  # it has no text before its end
            [text] = self.answers([Asked(messages)])
            print(text)
            return text
        typist = Typist(work.prompts, [], work.stops, work.eos_ids)
        self._generate([self.encoded(messages)], typist)
        typist.finish()
        return typist.text

    def answers(self, conversations: Sequence[Asked]) -> list[str]:
        """The answers to several conversations."""
        from flax_transformers.generation.prompts import until_stop

        work, found = self._work, list[str]()
        encoded = [self.encoded(asked.messages, asked.tools) for asked in conversations]
        size = min(self._command.batch_size, len(encoded))
        for first in range(0, len(encoded), size):
            some = encoded[first : first + size]
            rows = self._generate(some + [some[-1]] * (size - len(some)), None)
            for prompt, row in zip(some, rows.tolist(), strict=False):
                written = takewhile(lambda token: token not in work.eos_ids, row)
                if not self._plain:
                    text = until_stop(work.prompts.decode(written), 0, work.stops)
                    found.append(text.strip())
                    continue
                before = [] if work.answers else prompt  # of which a space may belong to the answer
                start = len(work.prompts.decode(before))
                text = until_stop(work.prompts.decode([*before, *written]), start, work.stops)
                found.append(text[start:])
        return found

    def _generate(self, encoded: list[list[int]], typist: Any) -> np.ndarray:
        """The new tokens of prompts, int32 [B, M]."""
        import jax

        with jax.set_mesh(self._mesh), watchdog.phase("evaluation"):
            tokens: np.ndarray = jax.device_get(self._work.generate(self._loaded, encoded, typist))
        return tokens


@contextmanager
def _template_errors() -> Iterator[None]:
    """Raises UserError where a template refuses messages."""
    from flax_transformers.post_training.chat_template import TemplateError

    try:
        yield
    except TemplateError as error:
        raise UserError(f"{error}; change the messages, or give another --template") from error


def _lines(question: str) -> Iterator[str]:
    """The lines of a terminal or of a file, up to an empty one."""
    while True:
        try:
            line = check_text("the input", input(question if sys.stdin.isatty() else "").strip())
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise UserError("the input is not UTF-8; convert it") from error
        if not line:
            return
        yield line


def _conversations(file: str) -> list[Asked]:
    """The prompts in a file, as conversations that end with a user's message."""
    from flax_transformers.data.sources.documents import Invalid
    from flax_transformers.generation.prompts import read_lines
    from flax_transformers.post_training.conversations import conversation

    lines = read_lines(file)
    if not file.endswith((".jsonl", ".ndjson")):
        return [Asked([{"role": "user", "content": line}]) for line in lines]
    found = []
    for place, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            json.dumps(record, ensure_ascii=False).encode()  # raises for lone surrogates
            one = conversation(_with_answer(record), f"{file}:{place}")
        except (ValueError, RecursionError, Invalid) as error:
            raise UserError(f"{file}:{place} is no conversation ({error}); correct it") from error
        turns = one.prompt or one.completions[0]
        whole: Any = [{"role": "user", "content": turns}] if isinstance(turns, str) else turns
        messages: list[Message] = list(whole)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if not messages:
            raise UserError(f"{file}:{place} has no message to answer; leave it out")
        found.append(Asked(messages, one.tools))
    return found


def _with_answer(record: Any) -> Any:
    """A prompt alone, as ``generate --prompts`` reads it, with an answer to leave out."""
    if isinstance(record, str):
        record = {"prompt": record}
    if isinstance(record, dict) and "prompt" in record and record.get("completion") is None:
        return {**record, "completion": [{"role": "assistant", "content": ""}]}
    return record


def _votes(
    conversations: Sequence[Asked], answers: Sequence[Sequence[str]], random: Any
) -> Iterator[float]:
    """Votes of a person, who does not know which answer is whose: 1 for the first model, 0 for the
    second, 0.5 for a tie."""
    for index, asked in enumerate(conversations):
        both = [of_model[index] for of_model in answers]
        swapped = bool(random.integers(2))
        print(f"\n{index + 1} of {len(conversations)}: {asked.messages[-1]['content']}\n")
        for place, text in enumerate(both[::-1] if swapped else both, 1):
            print(f"[{place}] {text}\n")
        vote = _vote()
        if vote is None:
            return
        yield 0.5 if vote == 0 else float((vote == 1) != swapped)


_VOTES: dict[str, Literal[0, 1, 2]] = {"0": 0, "1": 1, "2": 2}


def _vote() -> Literal[0, 1, 2] | None:
    """What a person types; None for the end."""
    for line in _lines("better (1, 2, 0 for a tie, q to end): "):
        if line in _VOTES:
            return _VOTES[line]
        if line == "q":
            return None
        print("type 1, 2, 0 or q", file=sys.stderr)
    return None


def _noted(
    path: str | None,
    conversations: Sequence[Asked],
    answers: Sequence[Sequence[str]],
    votes: Iterable[float],
) -> Iterator[float]:
    """The votes, each after its line in the file ``path`` is written, so that none is lost."""
    with _opened(path, "w") as file:
        for asked, first, second, vote in zip(conversations, *answers, votes, strict=False):
            if file is not None:
                print(_line(asked, first, second, vote=vote), file=file, flush=True)
            yield vote


def _line(asked: Asked, first: str, second: str, *, vote: float | None) -> str:
    """A line of ``--output``; ``vote``: None before a judge votes."""
    from flax_transformers.monitoring.metrics import json_text

    both = {"answers": [first, second], "first_is_better": vote}
    return json_text({"messages": asked.messages, **both})


def _opened(path: str | None, mode: Literal["a", "w"]) -> AbstractContextManager[IO[str] | None]:
    """A file for ``--output``. Raises UserError if it cannot be written."""
    if path is None:
        return nullcontext()
    try:
        return open(os.path.expanduser(path), mode, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error}); choose another") from error
