"""Adapters against PEFT, live: it loads those written here, and those it writes are read here."""

from __future__ import annotations

import jax
import numpy as np
import peft
import pytest
import torch
import transformers

import flax_transformers as ft
from flax_transformers.adapters.lora import LoraConfig, base_of, merged
from flax_transformers.huggingface.peft import write_adapter
from flax_transformers.huggingface.placement import adapted_shapes
from flax_transformers.testing import relative_difference
from tests.adapters.adapted_models import EVERYWHERE, adapted_model

IDS = np.array([[5, 7, 9, 3], [8, 6, 30, 4]], np.int32)
CASES = {
    "BertForMaskedLM": EVERYWHERE,
    "BertForSequenceClassification": LoraConfig(rank=2),
    "RobertaForSequenceClassification": LoraConfig(rank=2, rslora=True),
    "ModernBertForMaskedLM": EVERYWHERE,
    "GPT2LMHeadModel": LoraConfig(rank=2, targets=("query", "value", "feed-forward"), rslora=True),
    "LlamaForCausalLM": LoraConfig(rank=2, targets=("all-linear", "lm_head/words")),
    "T5ForConditionalGeneration": EVERYWHERE,
    "BartForConditionalGeneration": EVERYWHERE,
}


def logits_of(original, architecture):
    ids = torch.tensor(IDS, dtype=torch.long)
    targets = {"decoder_input_ids": ids} if "Conditional" in architecture else {}
    with torch.no_grad():
        return original.eval()(input_ids=ids, **targets).logits.numpy()


def our_logits(model, params):
    targets = {"decoder_input_ids": IDS} if "decoder_input_ids" in model.inputs else {}
    with jax.default_matmul_precision("highest"):
        return jax.jit(model.apply)({"params": params}, IDS, **targets).logits


@pytest.mark.parametrize("architecture", CASES)
def test_peft_gives_the_logits_of_adapters_written_here(tmp_path, architecture):
    lora = CASES[architecture]
    model, adapters, params = adapted_model(architecture, lora)
    ft.save_pretrained(tmp_path / "base", model, base_of(params))
    (tmp_path / "adapter").mkdir()
    boxed, _ = adapted_shapes(model, lora)
    base = str(tmp_path / "base")
    write_adapter(tmp_path / "adapter", base, model.config, boxed, adapters, params)
    original = getattr(transformers, architecture).from_pretrained(base)
    plain = logits_of(original, architecture)
    theirs = peft.PeftModel.from_pretrained(original, tmp_path / "adapter")
    found = logits_of(theirs, architecture)
    expected = our_logits(model, merged(params, lora.scale))
    assert relative_difference(found, expected) < 1e-5 < 0.01 < relative_difference(plain, expected)


@pytest.mark.parametrize("architecture", CASES)
def test_an_adapter_of_peft_gives_its_logits_here(tmp_path, architecture):
    torch.manual_seed(0)
    model, _, params = adapted_model(architecture, EVERYWHERE)
    ft.save_pretrained(tmp_path / "base", model, base_of(params))
    original = getattr(transformers, architecture).from_pretrained(tmp_path / "base")
    plain = logits_of(original, architecture)
    labels = architecture.endswith("SequenceClassification")
    task = {"task_type": "SEQ_CLS"} if labels else {}
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False,
        lora_dropout=0.1, rank_pattern={".*1.*": 2}, alpha_pattern={".*0.*": 7}, **task,
    )  # fmt: skip
    adapted = peft.get_peft_model(original, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    found, loaded = ft.load_pretrained(tmp_path / "adapter")
    assert found.config.architecture == architecture
    expected = logits_of(adapted, architecture)
    assert relative_difference(our_logits(found, loaded), expected) < 1e-5
    assert relative_difference(plain, expected) > 0.01
