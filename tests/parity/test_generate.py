"""Texts of tiny models with random weights, and filtered logits, against transformers, live."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process as theirs

import flax_transformers as ft
from flax_transformers.generation.decode import generate
from flax_transformers.generation.sampling import Sampling
from flax_transformers.generation.translate import generate_target
from flax_transformers.huggingface.generation_settings import read_settings
from tests.families.parity import first_by_default

VOCAB, LENGTH, NEW_TOKENS, PAD = 60, 7, 12, 0
WIDTH, HEADS, LAYERS, FEED_FORWARD = 24, 3, 2, 32
BART = {
    "vocab_size": VOCAB,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": FEED_FORWARD,
    "decoder_ffn_dim": FEED_FORWARD,
    "max_position_embeddings": 64,
    "pad_token_id": PAD,
    "decoder_start_token_id": 2,
}
MODELS = {
    "gpt2": (
        transformers.GPT2LMHeadModel,
        {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 64},
    ),
    "llama": (
        transformers.LlamaForCausalLM,
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": 1,
            "intermediate_size": FEED_FORWARD,
            "max_position_embeddings": 64,
        },
    ),
    "t5": (
        transformers.T5ForConditionalGeneration,
        {
            "d_model": WIDTH,
            "d_kv": 8,
            "num_layers": LAYERS,
            "num_heads": HEADS,
            "d_ff": FEED_FORWARD,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (transformers.BartForConditionalGeneration, BART),
    "marian": (transformers.MarianMTModel, BART),
}
DYNAMIC = (
    transformers.LlamaForCausalLM,
    MODELS["llama"][1]
    | {
        "max_position_embeddings": 9,
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0},
    },
)
SEEDS = (0, 1, 2)
SEARCHES = (
    {"num_beams": 1},
    {"num_beams": 1, "no_repeat_ngram_size": 2, "repetition_penalty": 1.3},
    {"num_beams": 4, "length_penalty": 0.6, "early_stopping": True},
    {"num_beams": 4, "length_penalty": 1.0, "early_stopping": False},
    {"num_beams": 4, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 5, "length_penalty": 0.0, "early_stopping": "never"},
    {"num_beams": 5, "length_penalty": -1.0, "early_stopping": False, "no_repeat_ngram_size": 2},
    {"num_beams": 4, "early_stopping": True, "no_repeat_ngram_size": 3, "min_new_tokens": 5},
    {"num_beams": 4, "forced_eos_token_id": 9, "bad_words_ids": [[5], [7, 8]]},
    {"num_beams": 4, "suppress_tokens": [5, 6], "renormalize_logits": True},
)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The original by kind and seed, and the same model here."""

    @cache
    def make(kind, seed):
        architecture, sizes = (MODELS | {"dynamic": DYNAMIC})[kind]
        torch.manual_seed(seed)
        config = architecture.config_class(**{"vocab_size": VOCAB, "pad_token_id": PAD, **sizes})
        original = architecture(config).eval()
        with torch.no_grad():
            for name, tensor in original.named_parameters():
                if "embed_positions" in name:
                    continue
                # Large weights: texts that do not repeat, and choices that are not close.
                if tensor.dim() > 1:
                    tensor.normal_(0, 0.4)
                else:
                    tensor.add_(0.2 * torch.randn_like(tensor))
        folder = tmp_path_factory.mktemp("original")
        original.save_pretrained(folder)
        return original, *ft.load_pretrained(folder)

    return make


def prompts(seed, *, left):
    """Ids and mask [3, 7], padded by 0, 2 and 5."""
    ids = np.random.default_rng(seed).integers(3, VOCAB, (3, LENGTH))
    mask = np.ones_like(ids)
    for row, padding in ((1, 2), (2, 5)):
        columns = slice(None, padding) if left else slice(LENGTH - padding, None)
        mask[row, columns], ids[row, columns] = 0, PAD
    return ids, mask


def until_end(tokens, eos):
    """Padded after the first end: the original pads with an end if the id of padding is 0."""
    found = np.full((len(tokens), NEW_TOKENS), PAD)
    for row, text in enumerate(tokens.tolist()):
        end = next((i for i, token in enumerate(text) if token in eos), len(text))
        found[row, : end + 1] = text[: end + 1]
    return found


@pytest.mark.parametrize("seed", first_by_default(SEEDS))
@pytest.mark.parametrize("kind", MODELS)
def test_texts_equal_those_of_transformers(kind, seed, both):
    original, model, params = both(kind, seed)
    answers = original.config.is_encoder_decoder
    ids, mask = prompts(seed, left=not answers)
    start = {"decoder_start_token_id": original.config.decoder_start_token_id} if answers else {}
    lengths, ends = set(), [2]
    for number, search in enumerate(SEARCHES):
        eos = ends if number % 2 else [2]
        given = {"max_new_tokens": NEW_TOKENS, "pad_token_id": PAD, "eos_token_id": eos}
        # The original counts padding of prompts as tokens that must not be repeated.
        given |= search | start | {"suppress_tokens": [PAD, *search.get("suppress_tokens", [])]}
        settings = transformers.GenerationConfig(do_sample=False, **given)
        original.generation_config = settings
        with torch.no_grad():
            texts = original.generate(
                torch.tensor(ids), attention_mask=torch.tensor(mask), generation_config=settings
            )
        expected = until_end(texts[:, 1 if answers else LENGTH :].numpy(), eos)
        write = generate_target if answers else generate
        found = write(model, params, ids, mask, settings=read_settings(given, "test"))
        np.testing.assert_array_equal(found, expected, err_msg=str(search))
        if not number:  # with tokens of the greedy texts, others end at different places
            ends = [2, *expected[0, 2:4].tolist(), int(expected[1, 5])]
        lengths |= set((expected != PAD).sum(axis=1).tolist())
    assert len(lengths) > 1


@pytest.mark.parametrize("seed", SEEDS)
def test_texts_longer_than_the_positions_of_training_equal_those_of_transformers(seed, both):
    """Of one prompt, for the original counts the longest of a batch for all of its rows."""
    original, model, params = both("dynamic", seed)
    ids = prompts(seed, left=True)[0][:1]
    given = {"max_new_tokens": 2 * NEW_TOKENS, "pad_token_id": PAD, "suppress_tokens": [PAD]}
    settings = transformers.GenerationConfig(do_sample=False, **given)
    original.generation_config = settings
    with torch.no_grad():
        texts = original.generate(torch.tensor(ids), generation_config=settings)
    found = generate(model, params, ids, np.ones_like(ids), settings=read_settings(given, "test"))
    np.testing.assert_array_equal(found, texts[:, LENGTH:].numpy())


@pytest.mark.parametrize(
    "filters",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.6},
        {"temperature": 1.0, "top_p": 0.001},
        {"temperature": 0.8, "min_p": 0.2},
        {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
        {"temperature": 0.5, "top_k": 1000, "top_p": 0.99},
    ],
)
def test_filtered_logits_equal_those_of_transformers(filters):
    logits = np.random.default_rng(0).normal(0, 3, (64, 500)).astype(np.float32)
    expected = torch.tensor(logits)
    for name, kind in (
        ("temperature", theirs.TemperatureLogitsWarper),
        ("top_k", theirs.TopKLogitsWarper),
        ("top_p", theirs.TopPLogitsWarper),
        ("min_p", theirs.MinPLogitsWarper),
    ):
        if name in filters:
            expected = kind(filters[name])(torch.zeros((64, 1), dtype=torch.long), expected)
    found = np.asarray(Sampling(**filters).log_probabilities(logits))
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected.numpy()))
    np.testing.assert_allclose(
        torch.tensor(found).softmax(-1), expected.softmax(-1), rtol=2e-5, atol=1e-9
    )
