"""``flax-transformers generate`` and ``fill-mask``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction

from flax_transformers.cli.parsing import Architecture, Flag, Model, number, option, override
from flax_transformers.errors import UserError
from flax_transformers.parallel.watchdog import watchdog
from flax_transformers.ranges import ENTRIES, EXAMPLES, INT32, POSITIONS, SHARE, integers, numbers

if TYPE_CHECKING:
    from flax_transformers.checkpointing.step_directories import SavedStep
    from flax_transformers.data.tokenizers.load import Tokenizer
    from flax_transformers.generation.prompts import Prompts, Typist
    from flax_transformers.models.config import TransformerConfig
    from flax_transformers.models.generation_settings import GenerationSettings
    from flax_transformers.runtime import StoredModel


@dataclass(frozen=True)
class Generate:
    """Continue a text with a language model, or answer one with an encoder-decoder.

    Settings that are not given are those of the model's generation config. --mesh.tensor 4 (also
    --mesh.fsdp and --mesh.expert) shards the model; --compute.dtype and its neighbours set how it
    is computed; --limits.evaluation-s limits the time.
    """

    model: Model
    prompt: UseAppendAction[tuple[str, ...]] = ()
    """The beginning of the text, or the source. Can be given several times."""
    prompts: Annotated[str | None, option("FILE")] = None
    """A text file with a prompt in each line, or a .jsonl file with the field prompt; this or
    --prompt is required."""
    batch_size: Annotated[int, number("--batch-size", EXAMPLES)] = 16
    """Number of prompts that are read at once."""
    architecture: Architecture = None
    max_new_tokens: Annotated[int | None, number("--max-new-tokens", POSITIONS), option()] = None
    """Largest number of new tokens (64 without a setting of the model)."""
    min_new_tokens: Annotated[int | None, number("--min-new-tokens", POSITIONS), option()] = None
    """Smallest number of new tokens."""
    temperature: Annotated[float | None, number("--temperature", numbers(0, 1e6)), option()] = None
    """Sampling temperature; 0 decodes greedily (0 without a setting of the model)."""
    top_k: Annotated[int | None, number("--top-k", ENTRIES), option()] = None
    """Sample among this many most likely tokens (50 without a setting of the model)."""
    top_p: Annotated[float | None, number("--top-p", numbers(0, 1, above=True)), option()] = None
    """Sample among the most likely tokens that have this probability together."""
    min_p: Annotated[float | None, number("--min-p", SHARE), option()] = None
    """Sample among tokens with at least this share of the probability of the most likely one."""
    num_beams: Annotated[int | None, number("--num-beams", integers(1, 1000)), option()] = None
    """Number of beams of beam search; 1 for none (1 without a setting of the model)."""
    length_penalty: Annotated[
        float | None, number("--length-penalty", numbers(-100, 100)), option()
    ] = None
    """Exponent of the length penalty of beam search (1 without a setting of the model)."""
    length_penalty_form: Literal["power", "gnmt"] | None = None
    """Scores are divided by length ** penalty (power, as transformers) or by ((5 + length) / 6) **
    penalty (gnmt, as the Transformer of 2017)."""
    early_stopping: Literal["true", "false", "never"] | None = None
    """When beam search ends: with as many texts as beams, if no better one is likely (false), or if
    none is possible (never)."""
    repetition_penalty: Annotated[
        float | None, number("--repetition-penalty", numbers(0, 1e6, above=True)), option()
    ] = None
    """Makes tokens that occurred before less likely, above 1."""
    no_repeat_ngram_size: Annotated[
        int | None, number("--no-repeat-ngram-size", integers(0, INT32)), option()
    ] = None
    """No sequence of this many tokens occurs twice."""
    stop: Annotated[UseAppendAction[tuple[str, ...]], option("TEXT")] = ()
    r"""A text that ends generation and is not printed; \n is a new line. Can be given several
    times."""
    start_ids: Annotated[str | None, option("ID,ID")] = None
    """First decoder tokens of an encoder-decoder (mBART: end of sequence and language)."""
    stream: Flag = False
    """Print one text while it is generated, as is done in a terminal."""
    seed: Annotated[int, number("--seed", integers(0, INT32))] = 0
    """Seed of sampling."""

    def run(self, overrides: Sequence[str]) -> int:
        import jax

        from flax_transformers import pretrained, runtime
        from flax_transformers.generation.program import arranged
        from flax_transformers.parallel.mesh import make_mesh

        texts = self._texts()
        options = override(runtime.ModelOptions(), overrides)
        start_ids = _ids(self.start_ids)
        runtime.start(None)
        watchdog.start(options.limits)
        mesh = make_mesh(options.mesh)
        with watchdog.phase("restore"):
            found = pretrained.find_pretrained(self.model)
            work = self.work_on(
                found, pretrained.describe_pretrained(found, self.architecture), start_ids
            )
            encoded = work.checked(texts)
            model, params = pretrained.load_pretrained(
                found, architecture=self.architecture, compute=options.compute, mesh=mesh
            )
            loaded = model, arranged(params)  # once for all batches
        with jax.set_mesh(mesh):
            for some in work.batches(encoded):
                with watchdog.phase("evaluation"):
                    for text in work.write(loaded, some):
                        print(text, flush=True)
        return 0

    def _texts(self) -> list[str]:
        """The prompts of the command line and of the file."""
        from flax_transformers.generation.prompts import read_texts

        texts = [*self.prompt, *([] if self.prompts is None else read_texts(self.prompts))]
        if not texts:
            raise UserError(
                "--prompt is missing, and so is --prompts; see flax-transformers generate --help"
            )
        if self.stream and len(texts) > 1:
            raise UserError(f"--stream prints one text, and there are {len(texts)} prompts")
        return texts

    def _settings(self, settings: GenerationSettings) -> GenerationSettings:
        """The model's settings with those of the command line."""
        given = {
            "min_new_tokens": self.min_new_tokens,
            "length_penalty_form": self.length_penalty_form,
            "repetition_penalty": self.repetition_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "stop_strings": tuple(map(_unescaped, self.stop)) or None,
        }
        chosen: dict[str, Any] = {name: v for name, v in given.items() if v is not None}
        if self.max_new_tokens is not None:
            chosen["max_new_tokens"] = self.max_new_tokens
        elif settings.max_new_tokens is None and settings.max_length is None:
            chosen["max_new_tokens"] = 64
        return replace(settings, **chosen)

    def work_on(
        self, found: SavedStep | Path, config: TransformerConfig, start_ids: tuple[int, ...]
    ) -> Work:
        """What the command does, before any weights are read.

        Raises UserError unless the model, its tokenizer and the settings fit each other.
        """
        from flax_transformers import pretrained
        from flax_transformers.generation.decode import require_writer, settings_of
        from flax_transformers.generation.prompts import read_prompts
        from flax_transformers.huggingface.family import build_model
        from flax_transformers.models.config import ComputeConfig
        from flax_transformers.training.check_run import check_tokenizer

        model: Any = build_model(config, ComputeConfig())
        if "decoder_input_ids" not in getattr(model, "inputs", ()):
            require_writer(model)
            if start_ids:
                raise UserError(
                    f"--start-ids is for encoder-decoders, and {self.model} holds a "
                    f"{config.architecture}; leave it out"
                )
        folder, target = pretrained.tokenizer_folders(found)
        prompts = read_prompts(folder, model.config, target)
        check_tokenizer(config, prompts.written.vocabulary, self.model)
        return Work(self, model, prompts, self._settings(settings_of(model)), start_ids)


class Work:
    """What is the same for all prompts of a command. ``model`` needs no parameters."""

    def __init__(
        self,
        command: Generate,
        model: Any,
        prompts: Prompts,
        settings: GenerationSettings,
        start_ids: tuple[int, ...],
    ) -> None:
        import jax

        from flax_transformers.generation.beams import Beams
        from flax_transformers.generation.choices import choice_of
        from flax_transformers.generation.prompts import special_stops, token_texts

        self.model, self.start_ids = model, start_ids
        self.command, self.prompts, self.settings = command, prompts, settings
        self.rows = command.batch_size
        self.answers = "decoder_input_ids" in model.inputs
        special, self.stops = special_stops(prompts.written, settings.stop_strings or ())
        self.eos_ids = (*(settings.eos_ids or prompts.eos_ids), *special)
        self.pad_id = model.config.filler_id
        self.token_texts = token_texts(prompts.written) if self.stops else []
        self.key = jax.random.key(command.seed)
        self.batches_written = 0
        self.choice = choice_of(
            settings,
            self.key,
            temperature=command.temperature,
            top_k=command.top_k,
            top_p=command.top_p,
            min_p=command.min_p,
            num_beams=command.num_beams,
            length_penalty=command.length_penalty,
            early_stopping=_EARLY_STOPPING[command.early_stopping],
        )
        if command.stream and isinstance(self.choice, Beams):
            raise UserError("beam search has no text before its end; leave out --stream")

    def checked(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of prompts. Raises UserError where generation would."""
        encoded = self.encoded(texts)
        self.check(encoded)
        return encoded

    def encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of prompts of any length."""
        return _encoded(self.prompts, texts, self.answers)

    def check(self, encoded: Sequence[Sequence[int]]) -> None:
        """Raises UserError for prompts that are too long for the model."""
        from flax_transformers.generation.decode import check_prompts
        from flax_transformers.generation.translate import check_source_lengths

        lengths, how = [len(ids) for ids in encoded], (None, self.choice, self.key, self.settings)
        if self.answers:
            check_source_lengths(self.model, lengths, self.start_ids, *how)
        else:
            check_prompts(self.model, lengths, *how)

    def batches(self, encoded: Sequence[list[int]]) -> Iterator[list[list[int]]]:
        """The prompts in groups of the batch size."""
        size = self.command.batch_size
        self.rows = min(size, len(encoded))
        return (list(encoded[i : i + size]) for i in range(0, len(encoded), size))

    def write(
        self, loaded: tuple[Any, Any], encoded: list[list[int]], *, shown: bool = True
    ) -> Iterator[str]:
        """The text of each prompt, to be printed; none if it was printed as it came, which only
        happens if it is ``shown``.

        ``loaded``: the model and its parameters.
        """
        import jax

        from flax_transformers.generation.beams import Beams
        from flax_transformers.generation.prompts import Typist, until_stop

        texts = len(encoded)
        encoded = encoded + [encoded[-1]] * (self.rows - texts)  # of the shape of other batches
        before = self._before(encoded)
        typist = None
        terminal = shown and texts == 1 and bool(sys.stdout and sys.stdout.isatty())
        terminal = terminal and not isinstance(self.choice, Beams)
        if self.command.stream or terminal:
            typist = Typist(self.prompts, before[0], self.stops, self.eos_ids)
        tokens = self.generate(loaded, encoded, typist)
        if typist is not None:
            typist.finish()
            return
        for prompt, row in zip(before[:texts], jax.device_get(tokens).tolist(), strict=False):
            written = takewhile(lambda token: token not in self.eos_ids, row)
            text = self.prompts.decode([*prompt, *written])
            yield until_stop(text, len(self.prompts.decode(prompt)), self.stops)

    def _before(self, encoded: list[list[int]]) -> list[list[int]]:
        """What the generated text of each prompt continues: nothing in an encoder-decoder."""
        return [[] if self.answers else prompt for prompt in encoded]

    def generate(
        self, loaded: tuple[Any, Any], encoded: list[list[int]], streamer: Typist | None
    ) -> Any:
        """The new tokens of prompts, int32 [B, M]; those of each call are drawn independently."""
        import jax

        from flax_transformers.generation.decode import generate
        from flax_transformers.generation.prompts import rows_of
        from flax_transformers.generation.stop_strings import StopStrings
        from flax_transformers.generation.translate import generate_target

        ids, mask = rows_of(encoded, self.pad_id, padded="right" if self.answers else "left")
        stops = None
        if self.stops:
            stops = StopStrings.of(self.stops, self.token_texts, self._before(encoded))
        key = jax.random.fold_in(self.key, self.batches_written)
        self.batches_written += 1
        kind: Any = partial(generate_target, start_ids=self.start_ids) if self.answers else generate
        return kind(
            *loaded,
            ids,
            mask,
            eos_id=self.eos_ids,
            pad_id=self.pad_id,
            choice=self.choice,
            settings=self.settings,
            key=key,
            stops=stops,
            streamer=streamer,
        )


_EARLY_STOPPING: dict[str | None, bool | Literal["never"] | None] = {
    None: None,
    "true": True,
    "false": False,
    "never": "never",
}


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _encoded(prompts: Prompts, texts: Sequence[str], answers: bool) -> list[list[int]]:
    """The ids of each text; sources end with the end token, as in training."""
    encoded = [list(prompts.encode(text)) for text in texts]
    for prompt in encoded if answers and prompts.prompt_eos_ids else ():
        if not set(prompt) & set(prompts.prompt_eos_ids):
            # The tokenizer of mBART puts the language after the end token.
            prompt.append(prompts.prompt_eos_ids[0])
    return encoded


def _ids(text: str | None) -> tuple[int, ...]:
    try:
        return () if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--start-ids is {text!r}; give ids separated by commas, such as 2,250004"
        ) from None


_MAX_MASKED_LENGTH = 8192
"""Largest number of tokens of a text if the model has no limit."""


@dataclass(frozen=True)
class FillMask:
    """Show the most likely tokens for each [MASK] of a text.

    --mesh.tensor 4 (also --mesh.fsdp) shards the model; --compute.dtype and its neighbours set how
    it is computed.
    """

    model: Model
    text: Annotated[str, option("TEXT")]
    """A text such as "Return a [MASK] object." """
    architecture: Architecture = None
    top: Annotated[int, number("--top", ENTRIES)] = 5
    """Number of candidates for each mask."""

    def run(self, overrides: Sequence[str]) -> int:
        import jax

        from flax_transformers import runtime
        from flax_transformers.generation.fill_mask import fill_mask
        from flax_transformers.parallel.mesh import make_mesh
        from flax_transformers.training.step import model_functions

        options = override(runtime.ModelOptions(), overrides)
        runtime.start(None)
        watchdog.start(options.limits)
        mesh = make_mesh(options.mesh)
        with watchdog.phase("restore"):
            stored = runtime.stored_model(self.model, self.architecture)
            tokenizer, limits = self._checked(stored)
            restored = runtime.restored_model(stored, mesh, options.compute)
        with jax.set_mesh(restored.mesh), watchdog.phase("evaluation"):
            filled = fill_mask(
                model_functions(restored.model),
                restored.params,
                tokenizer,
                self.text,
                top=self.top,
                pad_id=getattr(restored.model_config, "pad_id", -1),
                **limits,
            )
        for index, one in enumerate(filled.masked, 1):
            if len(filled.masked) > 1:
                print(f"mask {index}")
            for token, probability in one.candidates:
                print(f"{100 * probability:6.2f} %  {token}")
        return 0

    def _checked(self, stored: StoredModel) -> tuple[Tokenizer, dict[str, int]]:
        """The tokenizer, and the limits of the model. Raises UserError, before any weights are
        read, for a model that fills no masks and a text that it cannot read."""
        from flax_transformers.generation.fill_mask import masked_prompt, require_filler
        from flax_transformers.huggingface.family import build_model
        from flax_transformers.models.config import ComputeConfig, TextConfig

        config, tokenizer = stored.model, stored.tokenizer
        if tokenizer is None or not isinstance(config, TextConfig):
            raise UserError(f"{self.model} has no tokenizer; give a model of text")
        require_filler(build_model(config, ComputeConfig()), self.model)
        limits = {
            "vocab_size": config.vocab_size,
            "max_length": config.length_limit or _MAX_MASKED_LENGTH,
        }
        masked_prompt(tokenizer, self.text, **limits)
        return tokenizer, limits
