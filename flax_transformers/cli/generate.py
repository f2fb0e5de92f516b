"""``flax-transformers generate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import UseAppendAction

from flax_transformers.cli.parsing import Architecture, Model, number, option, override
from flax_transformers.errors import UserError
from flax_transformers.ranges import ENTRIES, INT32, POSITIONS, integers, numbers

if TYPE_CHECKING:
    from flax_transformers.generation.prompts import Prompts


@dataclass(frozen=True)
class Generate:
    """Continue a text with a language model, or answer one with an encoder-decoder.

    Settings that are not given are those of the model's generation config. --mesh.tensor 4 (also
    --mesh.fsdp and --mesh.expert) shards the model; --compute.dtype and its neighbours set how it
    is computed; --limits.evaluation-s limits the time.
    """

    model: Model
    prompt: UseAppendAction[tuple[str, ...]] = ()
    """The beginning of the text, or the source. Required; can be given several times."""
    architecture: Architecture = None
    max_new_tokens: Annotated[int | None, number("--max-new-tokens", POSITIONS), option()] = None
    """Largest number of new tokens (64 without a setting of the model)."""
    temperature: Annotated[float | None, number("--temperature", numbers(0, 1e6)), option()] = None
    """Sampling temperature; 0 decodes greedily (0 without a setting of the model)."""
    top_k: Annotated[int | None, number("--top-k", ENTRIES), option()] = None
    """Sample among this many most likely tokens (50 without a setting of the model)."""
    top_p: Annotated[float | None, number("--top-p", numbers(0, 1, above=True)), option()] = None
    """Sample among the most likely tokens that have this probability together."""
    start_ids: Annotated[str | None, option("ID,ID")] = None
    """First decoder tokens of an encoder-decoder (mBART: end of sequence and language)."""
    seed: Annotated[int, number("--seed", integers(0, INT32))] = 0
    """Seed of sampling."""

    def run(self, overrides: Sequence[str]) -> int:
        import jax

        from flax_transformers import runtime
        from flax_transformers.generation.decode import generate, settings_of
        from flax_transformers.generation.prompts import rows_of
        from flax_transformers.generation.translate import generate_target
        from flax_transformers.parallel.mesh import make_mesh
        from flax_transformers.parallel.watchdog import watchdog
        from flax_transformers.pretrained import load_pretrained

        if not self.prompt:
            raise UserError("--prompt is missing; see flax-transformers generate --help")
        placed = override(runtime.Placed(), overrides)
        start_ids = _ids(self.start_ids)
        runtime.start(None)
        watchdog.start(placed.limits)
        mesh = make_mesh(placed.mesh)
        with watchdog.phase("restore"):
            model, params = load_pretrained(
                self.model, architecture=self.architecture, compute=placed.compute, mesh=mesh
            )
        answers = "decoder_input_ids" in model.inputs
        prompts, encoded = self._prompts(model, answers, start_ids)
        settings = settings_of(model)
        eos_ids = settings.eos_ids or prompts.eos_ids
        pad_id = max(model.config.pad_id, 0)
        limit = self.max_new_tokens
        if limit is None and settings.max_new_tokens is None and settings.max_length is None:
            limit = 64
        ids, mask = rows_of(encoded, pad_id, padded="right" if answers else "left")
        write: Any = partial(generate_target, start_ids=start_ids) if answers else generate
        with jax.set_mesh(mesh), watchdog.phase("evaluation"):
            tokens = write(
                model,
                params,
                ids,
                mask,
                max_new_tokens=limit,
                eos_id=eos_ids,
                pad_id=pad_id,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                key=jax.random.key(self.seed),
            )
            tokens = jax.device_get(tokens).tolist()
        for prompt, row in zip(encoded, tokens, strict=True):
            written = takewhile(lambda token: token not in eos_ids, row)
            print(prompts.decode([*([] if answers else prompt), *written]))
        return 0

    def _prompts(
        self, model: Any, answers: bool, start_ids: tuple[int, ...]
    ) -> tuple[Prompts, list[list[int]]]:
        """The tokenizer of the model, and the ids of each prompt."""
        from flax_transformers.generation.decode import require_writer
        from flax_transformers.generation.prompts import read_prompts

        if not answers:
            require_writer(model)
            if start_ids:
                raise UserError(
                    f"--start-ids is for encoder-decoders, and {self.model} holds a "
                    f"{model.config.architecture}; leave it out"
                )
        folder, target = _tokenizer_folders(self.model)
        prompts = read_prompts(folder, model.config, target)
        return prompts, _encoded(prompts, self.prompt, answers)


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


def _tokenizer_folders(source: str) -> tuple[Any, Any]:
    """The folder of a model's tokenizer, and that of the targets if they have their own."""
    from flax_transformers.checkpointing.manager import find_checkpoint
    from flax_transformers.huggingface import folder_kinds
    from flax_transformers.huggingface import read as hub_read
    from flax_transformers.pretrained import is_checkpoint

    if is_checkpoint(source):
        folder = find_checkpoint(source).folder
        target = folder / "target_tokenizer"
        return folder / "tokenizer", target if target.is_dir() else None
    directory = hub_read.find_directory(source)
    assert directory is not None  # the model was there
    return folder_kinds.inner_folder(directory), None
