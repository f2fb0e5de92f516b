"""Let a language model go on with a text, or an encoder-decoder answer one."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from flax_transformers.cli.shared_arguments import MODEL_HELP, add_architecture
from flax_transformers.ranges import ENTRIES, INT32, POSITIONS, argument, integers, numbers

if TYPE_CHECKING:
    from flax_transformers.generation.prompts import Prompts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CKPT", help=MODEL_HELP)
    add_architecture(parser, "CKPT", "GPT2LMHeadModel")
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        help="the beginning of the text, or the source; may be given several times",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=argument("--max-new-tokens", POSITIONS),
        help="at most; by default what the model's generation settings say, else 64",
    )
    parser.add_argument(
        "--temperature",
        type=argument("--temperature", numbers(0, 1e6)),
        help="0: always the likeliest token; by default what the model's generation settings say, "
        "else 0",
    )
    parser.add_argument(
        "--top-k",
        type=argument("--top-k", ENTRIES),
        help="sample among so many likeliest tokens; by default what the model's generation "
        "settings say, else 50",
    )
    parser.add_argument(
        "--top-p",
        type=argument("--top-p", numbers(0, 1, above=True)),
        help="sample among the likeliest that have this probability together",
    )
    parser.add_argument(
        "--start-ids",
        metavar="ID,ID",
        help="what an encoder-decoder's text begins with (mBART: end of sequence and language); "
        "by default what the model's files say",
    )
    parser.add_argument(
        "--seed",
        type=argument("--seed", integers(0, INT32)),
        default=0,
        help="another seed, another sample",
    )
    parser.epilog = (
        "--mesh.tensor 4 divides a model over devices (and so do --mesh.fsdp and --mesh.expert); "
        "--compute.dtype and its neighbours say how it is computed."
    )


def run(arguments: argparse.Namespace, overrides: Sequence[str]) -> int:
    import jax

    from flax_transformers import runtime
    from flax_transformers.cli.config_file import override
    from flax_transformers.errors import UserError
    from flax_transformers.generation.decode import generate, require_writer, settings_of
    from flax_transformers.generation.prompts import read_prompts, rows_of
    from flax_transformers.generation.translate import generate_target
    from flax_transformers.parallel.mesh import make_mesh
    from flax_transformers.pretrained import load_pretrained

    placed = override(runtime.Placed(), overrides)
    start_ids = _ids(arguments.start_ids)
    runtime.start(None)
    source = arguments.checkpoint
    mesh = make_mesh(placed.mesh)
    model, params = load_pretrained(
        source, architecture=arguments.architecture, compute=placed.compute, mesh=mesh
    )
    answers = "decoder_input_ids" in model.inputs
    if not answers:
        require_writer(model)
        if start_ids:
            raise UserError(
                f"--start-ids is for encoder-decoders, and {source} holds a "
                f"{model.config.architecture}; leave it out"
            )
    folder, target = _tokenizer_folders(source)
    prompts = read_prompts(folder, model.config, target)
    encoded = _encoded(prompts, arguments.prompt, answers)
    settings = settings_of(model)
    eos_ids = settings.eos_ids or prompts.eos_ids
    pad_id = max(model.config.pad_id, 0)
    limit = arguments.max_new_tokens
    if limit is None and settings.max_new_tokens is None and settings.max_length is None:
        limit = 64
    ids, mask = rows_of(encoded, pad_id, padded="right" if answers else "left")
    write: Any = generate
    if answers:
        write = partial(generate_target, start_ids=start_ids)
    with jax.set_mesh(mesh):
        tokens = write(
            model,
            params,
            ids,
            mask,
            max_new_tokens=limit,
            eos_id=eos_ids,
            pad_id=pad_id,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            key=jax.random.key(arguments.seed),
        )
    for prompt, row in zip(encoded, jax.device_get(tokens).tolist(), strict=True):
        written = takewhile(lambda token: token not in eos_ids, row)
        print(prompts.decode([*([] if answers else prompt), *written]))
    return 0


def _encoded(prompts: Prompts, texts: Sequence[str], answers: bool) -> list[list[int]]:
    """The ids of each text; those of a source with the end that it has in training."""
    encoded = [list(prompts.encode(text)) for text in texts]
    for prompt in encoded if answers and prompts.prompt_eos_ids else ():
        if not set(prompt) & set(prompts.prompt_eos_ids):
            # mBART's tokenizer puts the language after it.
            prompt.append(prompts.prompt_eos_ids[0])
    return encoded


def _ids(text: str | None) -> tuple[int, ...]:
    from flax_transformers.errors import UserError

    try:
        return () if text is None else tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--start-ids is {text!r}; give numbers with commas between them, such as 2,250004"
        ) from None


def _tokenizer_folders(source: str) -> tuple[Any, Any]:
    """Where the tokenizer of a model lies that could be loaded; and where that of the targets, if
    they have one of their own."""
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
