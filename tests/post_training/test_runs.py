"""Whole runs on conversations and preferences: resumed, evaluated, and refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.adapters.lora import LoraConfig, base_of, merged
from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.checkpointing.manager import find_checkpoint, restore_params
from flax_transformers.cli.main import main
from flax_transformers.config_json import from_json, to_json
from flax_transformers.data.dataset import prepare
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.data.tokenizers.load import TokenizerConfig, load_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.post_training.chat_data import ChatData
from flax_transformers.post_training.chat_template import CHATML, template_of
from flax_transformers.post_training.conversations import ConversationSource, embedded_rows
from flax_transformers.post_training.preference import DirectPreference
from flax_transformers.post_training.reward_model import RewardModel
from flax_transformers.post_training.supervised import (
    SupervisedEncoderDecoder,
    SupervisedFineTuning,
)
from flax_transformers.runtime import completed_data
from flax_transformers.testing import assert_bit_equal, tiny_architecture, tiny_config
from flax_transformers.training.config import Evaluation, Phase
from flax_transformers.training.step import model_functions
from tests.huggingface.tensors import drawn_model
from tests.post_training.reinforcement.online_runs import Dies

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device", "compiled_once")]

BYTES = {"vocab_size": 262, "max_positions": 192, "pad_id": 0, "eos_ids": (1,)}
STEPS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with 24 preferences, and a model to start from."""
    path = tmp_path_factory.mktemp("place")
    rows = [{k: v for k, v in row.items() if k != "completion"} for row in embedded_rows(24)]
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model, params = drawn_model("LlamaForCausalLM", bos_id=None, **BYTES)
    ft.save_pretrained(path / "model", model, params, tokenizer=ByteTokenizer())
    return path


def config_of(place, objective, steps=STEPS, **changes):
    data = ChatData(
        source=ConversationSource(str(place / "pairs.jsonl")),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.25,
        store=str(place / "store"),
        shards=1,
    )
    model = tiny_architecture("LlamaForCausalLM", bos_id=None, **BYTES)
    config = tiny_config("", "", model=model)
    return replace(
        config,
        objective=objective,
        data=data,
        init_from=str(place / "model"),
        phases=(Phase(steps=steps, sequence_length=192, batch_size=4),),
        evaluation=Evaluation(every_steps=2, batch_size=4),
        **changes,
    )


def with_reward_head(config):
    """The config with a sequence classifier of one label."""
    model = replace(config.model, architecture="LlamaForSequenceClassification", num_labels=1)
    return replace(config, model=model)


def losses(workdir):
    return [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]


def params_of(workdir):
    return restore_params(find_checkpoint(workdir))


class StopAtTwo(ft.Callback):
    def on_step(self, step, state):
        if step == 2:
            self.stop("the second step")


@pytest.fixture(scope="module")
def preference(place, tmp_path_factory):
    """A run of DPO with adapters."""
    workdir = tmp_path_factory.mktemp("preference")
    config = config_of(place, DirectPreference(), lora=LoraConfig(rank=2, targets=("all-linear",)))
    return config, workdir, ft.train(config, workdir)


def test_dpo_begins_with_ln_2_and_is_resumed_to_the_same_bits(preference, tmp_path):
    config, workdir, outcome = preference
    assert losses(workdir)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert ft.train(config, tmp_path, callbacks=[StopAtTwo()]).step == 2
    resumed = ft.train(config, tmp_path)
    assert losses(tmp_path) == losses(workdir)
    assert resumed.metrics["eval/loss"] == outcome.metrics["eval/loss"]
    assert_bit_equal(params_of(tmp_path), params_of(workdir))


def test_the_reference_is_the_trained_model_with_its_adapters_off(preference):
    """What was stored before the first step is what the kernels under the adapters still give."""
    config, workdir, _ = preference
    objective, params, rng = config.objective, params_of(workdir), np.random.default_rng(0)
    prepared = completed_data(config, prepare(config.data))
    example = prepared.examples("train", objective.window_spec(192)).read(0, rng)
    row = objective.prepare(example, rng, prepared.vocabulary, 192)
    batch = {name: array[None] for name, array in row.items()}
    functions = model_functions(build_model(config.model, ComputeConfig()))
    log_probs = jax.jit(lambda weights: objective.log_probs(functions, weights, batch)[0])
    off, on = map(log_probs, (base_of(params), merged(params, config.lora.scale)))
    np.testing.assert_allclose(off, batch["reference"], rtol=1e-5)
    assert np.abs(on - batch["reference"]).max() > 1e-3


def test_the_reference_is_computed_once_and_used_in_evaluation(preference, place, capsys, caplog):
    _, workdir, outcome = preference
    stored = list(Path(place, "store", "reference").iterdir())
    assert len(stored) == 2  # of the training and of the held-out split
    assert main(["evaluate", str(workdir)]) == 0
    assert json.loads(capsys.readouterr().out)["eval/loss"] == outcome.metrics["eval/loss"]
    assert "computing log-probabilities" not in caplog.text


def test_another_reference_than_the_run_began_with_is_refused(preference, place, tmp_path):
    config, _, _ = preference
    other, params = drawn_model("LlamaForCausalLM", bos_id=None, **BYTES)
    table = params["words"]["embedding"] + np.float32(0.1)
    changed = {**params, "words": {"embedding": table}}
    ft.save_pretrained(tmp_path / "model", other, params, tokenizer=ByteTokenizer())
    moved = replace(config, init_from=str(tmp_path / "model"))
    ft.train(moved, tmp_path / "run", callbacks=[StopAtTwo()])
    (tmp_path / "model").rename(tmp_path / "before")
    ft.save_pretrained(tmp_path / "model", other, changed, tokenizer=ByteTokenizer())
    with pytest.raises(UserError, match="has other weights than when the run in .* began"):
        ft.train(moved, tmp_path / "run")


def test_dpo_without_a_reference_is_refused(place, tmp_path):
    config = replace(config_of(place, DirectPreference()), init_from=None)
    with pytest.raises(UserError, match="compares with a reference model; set --init-from"):
        ft.train(config, tmp_path)


def test_a_reference_with_another_vocabulary_is_refused(place, tmp_path):
    model, params = drawn_model("LlamaForCausalLM", bos_id=None, **{**BYTES, "vocab_size": 200})
    ft.save_pretrained(tmp_path / "small", model, params)
    objective = DirectPreference(reference=str(tmp_path / "small"))
    with pytest.raises(UserError, match="has 200 tokens, but the tokenizer has 262"):
        ft.train(config_of(place, objective), tmp_path / "run")


@pytest.mark.full
@pytest.mark.parametrize(
    "objective",
    [SupervisedFineTuning(), RewardModel(centering=0.01), DirectPreference()],
    ids=["supervised", "reward", "preference"],
)
def test_a_killed_run_resumes_to_the_same_bits(objective, place, tmp_path):
    config = config_of(place, objective, checkpoints=CheckpointConfig(every_steps=2))
    if isinstance(objective, RewardModel):
        config = with_reward_head(config)
    ft.train(config, tmp_path / "straight")
    with pytest.raises(RuntimeError, match="killed"):
        ft.train(config, tmp_path / "killed", callbacks=[Dies(3)])
    assert find_checkpoint(tmp_path / "killed").folder.name == "2"
    ft.train(config, tmp_path / "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert_bit_equal(params_of(tmp_path / "killed"), params_of(tmp_path / "straight"))


@pytest.mark.full
def test_fine_tuning_learns_and_its_checkpoint_has_the_template(place, tmp_path):
    config = config_of(place, SupervisedFineTuning(), steps=6)
    assert from_json(to_json(config)) == config
    outcome = ft.train(config, tmp_path)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] and outcome.metrics["eval/loss"] < 6
    saved = load_tokenizer(find_checkpoint(tmp_path).folder / "tokenizer")
    assert template_of(saved).source == CHATML


@pytest.mark.full
def test_a_reward_model_starts_from_a_language_model_and_is_exported(place, tmp_path):
    config = with_reward_head(config_of(place, RewardModel(centering=0.01), steps=2))
    outcome = ft.train(config, tmp_path / "run")
    assert 0 <= outcome.metrics["eval/accuracy"] <= 1
    out = str(tmp_path / "hf")
    assert main(["convert", str(tmp_path / "run"), out]) == 0
    published = json.loads(Path(out, "config.json").read_text())
    assert published["architectures"] == ["LlamaForSequenceClassification"]
    assert len(published["id2label"]) == 1


@pytest.mark.full
def test_an_encoder_decoder_is_fine_tuned(place, tmp_path):
    config = config_of(place, SupervisedEncoderDecoder(target_length=16), steps=2)
    model = tiny_architecture("T5ForConditionalGeneration", vocab_size=262)
    outcome = ft.train(replace(config, model=model, init_from=None), tmp_path)
    assert outcome.step == 2 and outcome.metrics["eval/loss"] > 0
