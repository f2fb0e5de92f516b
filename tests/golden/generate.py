"""Writes generate.npz: what Hugging Face's ``generate`` writes after padded prompts or sources,
greedily and by beam search.

Run with torch and transformers installed: ``python -m tests.golden.generate``. Of each case the
file holds the new tokens, int32 [B, NEW_TOKENS], and the ids that end a text. The script makes sure
that no choice is close, so that rounding cannot decide it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tests.golden import bart, marian, t5
from tests.golden.gpt2 import gpt2
from tests.golden.hub import Case, full_precision_softmax, load_original
from tests.golden.llama import PAD, TOKENS, case, llama

OUTPUT = Path(__file__).with_suffix(".npz")
NEW_TOKENS = 12
MARGIN = 1e-3
"""Smallest gap between the logits of the first and the second choice."""

CASES = (
    gpt2("write_gpt2", "GPT2LMHeadModel", TOKENS, n_positions=40),
    llama("write_llama", "LlamaForCausalLM", TOKENS),
    case("write_mistral", "MistralForCausalLM", TOKENS, model_type="mistral", sliding_window=4),
    case("write_mixtral", "MixtralForCausalLM", TOKENS, model_type="mixtral", num_local_experts=4),
    case("write_gemma", "GemmaForCausalLM", TOKENS, model_type="gemma", head_dim=10),
)


def prompts(written: Case) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [3, 7] of the case's first tokens: no padding, then 2 and 5 on the left."""
    ids = written.inputs["input_ids"][:3, 4:11].copy()
    ids[1] = written.inputs["input_ids"][1, :7]
    mask = np.ones_like(ids)
    for row, padding in ((1, 2), (2, 5)):
        mask[row, :padding] = 0
        ids[row, :padding] = PAD
    assert (ids[mask == 1] != PAD).all()
    return ids, mask


def write(written: Case) -> dict[str, np.ndarray]:
    """The new tokens of a case, and the two ids that end a text."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        model = load_original(written, Path(folder))
    ids, mask = (torch.tensor(array).long() for array in prompts(written))
    settings = {
        "attention_mask": mask,
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "pad_token_id": PAD,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with full_precision_softmax():
        free = model.generate(ids, **settings, eos_token_id=None)
        logits = torch.stack(free.logits).sort(-1, descending=True).values
        margin = float((logits[..., 0] - logits[..., 1]).min())
        print(f"{written.name}: margin {margin:.1e}")
        assert margin > MARGIN, f"give {written.name} another name, to draw other weights"
        eos = [int(free.sequences[0, 7 + 3]), int(free.sequences[1, 7 + 6])]
        ended = model.generate(ids, **settings, eos_token_id=eos).sequences[:, 7:]
    tokens = np.full((3, NEW_TOKENS), PAD, np.int32)  # it stops when all rows have ended
    tokens[:, : ended.shape[1]] = ended
    return {
        f"{written.name}/free": free.sequences[:, 7:].numpy().astype(np.int32),
        f"{written.name}/eos": np.array(eos, np.int32),
        f"{written.name}/ended": tokens,
    }


_SAME_DEPTH = {"num_layers": 2, "num_decoder_layers": 2}
_LONG = {"max_position_embeddings": 40}
BEAM_CASES = {
    made.name: made
    for made in (
        gpt2("beams_gpt2", "GPT2LMHeadModel", TOKENS, n_positions=40),
        llama("beams_llama", "LlamaForCausalLM", TOKENS),
        t5.generation("beams_t5_5", "T5ForConditionalGeneration", "gated-gelu", **_SAME_DEPTH),
        bart.bart("beams_bart_7", "BartForConditionalGeneration", "gelu", bart.LOGITS, **_LONG),
        marian.marian("beams_marian", "MarianMTModel", "swish", bart.LOGITS, **_LONG),
    )
}
BEAMS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("beams_gpt2", {"num_beams": 4, "length_penalty": 0.6, "early_stopping": True}),
    ("beams_gpt2", {"num_beams": 5, "length_penalty": 2.0, "early_stopping": False}),
    (
        "beams_gpt2",
        {
            "num_beams": 4,
            "no_repeat_ngram_size": 2,
            "early_stopping": "never",
            "suppress_tokens": [PAD],  # the original counts padding of prompts as tokens
        },
    ),
    ("beams_llama", {"num_beams": 4, "length_penalty": -1.0, "early_stopping": "never"}),
    ("beams_t5_5", {"num_beams": 4, "length_penalty": 0.6, "early_stopping": False}),
    ("beams_t5_5", {"num_beams": 5, "no_repeat_ngram_size": 2, "early_stopping": True}),
    (
        "beams_bart_7",
        {
            "num_beams": 4,
            "length_penalty": 2.0,
            "no_repeat_ngram_size": 2,
            "forced_eos_token_id": 2,
        },
    ),
    (
        "beams_marian",
        {
            "num_beams": 4,
            "no_repeat_ngram_size": 3,
            "bad_words_ids": [[31]],
            "renormalize_logits": True,
        },
    ),
)
"""Models, and settings of beam search as in a generation_config.json."""
NOISE = 1e-4
"""Standard deviation of noise on log-probabilities that changes no text."""


def sources(written: Case) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [3, 7] of an encoder-decoder: no padding, then 2 and 5 on the right."""
    ids = written.inputs["input_ids"][:3, :7].copy()
    mask = np.ones_like(ids)
    for row, padding in ((1, 2), (2, 5)):
        mask[row, -padding:] = 0
        ids[row, -padding:] = PAD
    return ids, mask


def starts_of_targets(written: Case) -> dict[str, int]:
    """The decoder's first input; none for a decoder alone."""
    if "decoder_input_ids" not in written.inputs:
        return {}
    return {"decoder_start_token_id": written.config.get("decoder_start_token_id", 2)}


def search(written: Case, settings: dict[str, Any]) -> dict[str, np.ndarray]:
    """Texts by beam search, padded after their ends, and the two ids that end them."""
    import torch
    import transformers

    start = starts_of_targets(written)
    with tempfile.TemporaryDirectory() as folder:
        model = load_original(written, Path(folder))
    ids, mask = (torch.tensor(a).long() for a in (sources if start else prompts)(written))
    before = 1 if start else ids.shape[1]

    def texts(eos: list[int], *noise: Any, **settings: Any) -> np.ndarray:
        model.generation_config = transformers.GenerationConfig(
            max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=PAD, eos_token_id=eos,
            **start, **settings,
        )  # fmt: skip
        found = model.generate(ids, attention_mask=mask, logits_processor=list(noise))
        return padded_after_end(found[:, before:].numpy(), eos)

    with full_precision_softmax():
        free = texts([10**6], **settings)  # ends nothing
        eos = [_later(free[0], 3), _later(free[1], 6)]
        found = texts(eos, **settings)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)

            def noisy(ids: Any, scores: Any, generator: Any = generator) -> Any:
                return scores + NOISE * torch.randn(scores.shape, generator=generator)

            same = np.array_equal(texts(eos, noisy, **settings), found)
            assert same, f"{written.name} {settings}: a choice is close"
    print(f"{written.name} {settings}: {(found != PAD).sum(axis=1)} tokens")
    return {"eos": np.array(eos, np.int32), "tokens": found}


def _later(text: np.ndarray, place: int) -> int:
    """A token from ``place`` on, or an earlier one if there is only padding."""
    return int([*text[place:][text[place:] != PAD], *text[text != PAD]][0])


def padded_after_end(tokens: np.ndarray, eos: list[int]) -> np.ndarray:
    """int32 [B, NEW_TOKENS] with ``PAD`` after the first end: the original pads with an end if the
    id of padding is 0."""
    found = np.full((len(tokens), NEW_TOKENS), PAD, np.int32)
    for row, text in enumerate(tokens.tolist()):
        end = next((i for i, token in enumerate(text) if token in eos), len(text))
        found[row, : end + 1] = text[: end + 1]
    return found


if __name__ == "__main__":
    results: dict[str, np.ndarray] = {}
    for each in CASES:
        results |= write(each)
    for number, (name, chosen) in enumerate(BEAMS):
        found = search(BEAM_CASES[name], chosen)
        results |= {f"beams_{number}/{key}": value for key, value in found.items()}
    np.savez_compressed(OUTPUT, **results)
