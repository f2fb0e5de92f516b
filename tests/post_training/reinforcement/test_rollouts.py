"""Runs whose batches are completions of the model in training, on one device."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.adapters.lora import LoraConfig
from flax_transformers.checkpointing.manager import find_checkpoint, restore_params
from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare
from flax_transformers.data.sources.pairs import PairSource
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.data.tokenizers.load import TokenizerConfig, load_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.evaluation.tasks import evaluators
from flax_transformers.huggingface.family import build_model
from flax_transformers.monitoring.metrics import read_metrics
from flax_transformers.post_training.chat_template import template_of
from flax_transformers.post_training.problems import Problems
from flax_transformers.post_training.reinforcement.rewards import FunctionReward
from flax_transformers.post_training.reinforcement.rollouts import (
    Prompt,
    Sampler,
    batch_source,
    prompt_of,
)
from flax_transformers.testing import assert_bit_equal
from flax_transformers.training import loop
from flax_transformers.training.config import Evaluation, Phase
from tests.golden.tokenizer_layouts import llama3, write
from tests.post_training.reinforcement.online_runs import FAULT, Dies, config_for, odd, rows_of, run

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device", "compiled_once")]

LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}"
    "<|end_header_id|>\n\n{{ message.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{{ '' }}"
    "{% endif %}"
)


@pytest.fixture(autouse=True)
def no_fault():
    yield
    FAULT.clear()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Eight steps: two rollouts of two batches, each trained on twice, with held-out rewards."""
    workdir = tmp_path_factory.mktemp("straight")
    return workdir, run(config_for(), workdir, evaluate=True)


@pytest.mark.parametrize("step", [4, pytest.param(6, marks=pytest.mark.full), 7])
def test_a_killed_run_resumes_to_the_same_bits(step, straight, tmp_path):
    """From checkpoint 3, in the middle of the first rollout, and from 6, in the second."""
    with pytest.raises(RuntimeError, match="killed"):
        run(config_for(), tmp_path, [Dies(step)])
    assert int(find_checkpoint(tmp_path).folder.name) == (step - 1) // 3 * 3
    run(config_for(), tmp_path)
    assert_bit_equal(restore_params(tmp_path), restore_params(straight[0]))
    assert rows_of(tmp_path) == rows_of(straight[0])
    assert (tmp_path / "ledger-0.jsonl").read_text() == (straight[0] / "ledger-0.jsonl").read_text()


def test_the_age_of_rollouts_is_counted_and_bounded(straight):
    rows = rows_of(straight[0])
    assert [rows[step]["rollout/off_policy_steps"] for step in range(1, 9)] == [0, 1, 2, 3] * 2
    assert rows[1]["train/loss"] == pytest.approx(0.0, abs=1e-6)
    rewards = [rows[step]["rollout/reward"] for step in (1, 2, 3, 4)]
    assert rewards[:2] == rewards[2:] and rewards[0] != rewards[1]


def test_the_time_of_rollouts_is_counted_as_such(straight):
    rows = [row for row in read_metrics(straight[0]) if "goodput/rollouts_s" in row]
    spent = [row["goodput/rollouts_s"] for row in rows]
    assert 0 < spent[0] == spent[3] < spent[4] == spent[7]


def test_rollouts_can_be_read(straight):
    workdir, outcome = straight
    lines = (workdir / "rollouts" / "step_00000004.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 16 and len({row["prompt"] for row in rows[:4]}) == 1
    for row in rows:
        assert row["rewards"]["odd"] == odd([], [row["completion"]], [])[0]
    assert 0 <= outcome.metrics["eval/odd"] <= 1
    assert outcome.metrics["eval/reward"] == outcome.metrics["eval/odd"]


def test_a_missing_rollout_is_sampled_again(straight, tmp_path, caplog):
    with pytest.raises(RuntimeError, match="killed"):
        run(config_for(), tmp_path, [Dies(4)])
    (tmp_path / "rollouts" / "step_00000000.npz").write_bytes(b"damaged")
    run(config_for(), tmp_path)
    assert "new completions are sampled" in caplog.text
    ages = {step: row["rollout/off_policy_steps"] for step, row in rows_of(tmp_path).items()}
    assert ages == {1: 0, 2: 1, 3: 2, 4: 0, 5: 0, 6: 1, 7: 2, 8: 3}


def test_files_of_an_abandoned_continuation_do_not_push_out_newer_ones(straight, tmp_path):
    """A run that returns to an early checkpoint still resumes within its rollouts."""
    folder = tmp_path / "rollouts"
    folder.mkdir()
    for step in range(1000, 1200):
        (folder / f"step_{step:08d}.npz").write_bytes(b"later")
    with pytest.raises(RuntimeError, match="killed"):
        run(config_for(), tmp_path, [Dies(7)])
    kept = sorted(file.name for file in folder.glob("*.npz"))
    assert kept == ["step_00000000.npz", "step_00000004.npz"]
    run(config_for(), tmp_path)
    assert_bit_equal(restore_params(tmp_path), restore_params(straight[0]))


def test_prompts_are_those_of_the_subset(tmp_path):
    data = Problems(task="copying", digits=2, training=50, held_out=6, max_training_examples=2)
    run(config_for(data=data), tmp_path)
    files = (tmp_path / "rollouts").glob("*.jsonl")
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert len({json.loads(line)["prompt"] for line in lines}) == 2


def test_a_reward_that_fails_in_evaluation_loses_nothing(tmp_path):
    config = config_for(steps=5)
    config = dataclasses.replace(config, evaluation=Evaluation(every_steps=4, batch_size=4))
    FAULT.append(1)
    with pytest.raises(UserError, match="odd fails with ValueError"):
        run(config, tmp_path, evaluate=True)
    assert int(find_checkpoint(tmp_path).folder.name) == 4
    FAULT.clear()
    run(config, tmp_path, evaluate=True)
    assert [row["step"] for row in find_checkpoint(tmp_path).meta["evaluations"]] == [4, 5]


def test_a_reward_that_fails_loses_nothing(straight, tmp_path):
    FAULT.append(1)  # the second rollout, after step 4, which no schedule saves
    with pytest.raises(UserError, match="odd fails with ValueError: the judge is out"):
        run(config_for(), tmp_path)
    assert int(find_checkpoint(tmp_path).folder.name) == 4
    FAULT.clear()
    run(config_for(), tmp_path)
    assert_bit_equal(restore_params(tmp_path), restore_params(straight[0]))
    assert rows_of(tmp_path) == rows_of(straight[0])


def test_another_reference_is_refused_by_a_run_with_a_checkpoint(tmp_path):
    config = config_for(steps=3, kl_coefficient=0.1)
    file = tmp_path / "rollouts" / "reference.txt"
    file.parent.mkdir()
    file.write_text("00000000\n")  # of a run that ended before its first checkpoint
    run(config, tmp_path)
    assert file.read_text() != "00000000\n"
    assert rows_of(tmp_path)[1]["policy/kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows_of(tmp_path)[3]["policy/kl"] > 1e-6
    file.write_text("00000000\n")
    longer = dataclasses.replace(config, phases=(Phase(4, 16, 8),))
    with pytest.raises(UserError, match="the reference, the initial parameters, has other values"):
        run(longer, tmp_path)


def test_another_number_of_prompts_is_refused_within_a_phase(tmp_path, caplog):
    """Their order depends on it. The first rollout trains four steps; the second has begun."""
    config = config_for(steps=6)
    run(config, tmp_path)
    note = tmp_path / "rollouts" / "prompts_0.txt"
    assert note.read_text() == "50\n"
    note.write_text("49\n")
    longer = dataclasses.replace(config, phases=(Phase(7, 16, 8),))
    with pytest.raises(UserError, match=r"gives 50 prompts to phases.0, which began with 49 "):
        run(longer, tmp_path)
    note.unlink()  # as in a run of an earlier version
    run(longer, tmp_path)
    assert note.read_text() == "50\n" and "in another order" not in caplog.text


@pytest.mark.parametrize("steps", [4, 6])
def test_other_prompts_than_those_of_an_earlier_version_are_warned_of(steps, tmp_path, caplog):
    config = config_for(steps=steps)
    run(config, tmp_path)
    folder = tmp_path / "rollouts"
    (folder / "prompts_0.txt").unlink()
    file = folder / f"step_{(steps - 1) // 4 * 4:08d}.jsonl"
    file.write_text(file.read_text().replace('"prompt": "', '"prompt": "other '))
    run(dataclasses.replace(config, phases=(Phase(steps + 1, 16, 8),)), tmp_path)
    assert f"{file.name} are not those that the data give" in caplog.text


def test_the_reference_of_adapters_is_the_model_without_them(tmp_path):
    config = config_for(steps=3, kl_coefficient=0.1, lora=LoraConfig(rank=2), batches=1)
    run(config, tmp_path)
    rows = rows_of(tmp_path)
    assert rows[1]["policy/kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[3]["policy/kl"] > 1e-7
    assert not (tmp_path / "rollouts" / "reference.txt").exists()


def test_the_reference_keeps_what_is_trained_beside_adapters(tmp_path):
    """A run whose adapters do not move: all of the divergence comes from the output table."""
    lora = LoraConfig(rank=2, alpha=1e-6, fully_trained=("lm_head",))
    config = config_for(steps=3, kl_coefficient=0.1, lora=lora, batches=1)
    run(config, tmp_path)
    rows = rows_of(tmp_path)
    assert rows[1]["policy/kl"] == pytest.approx(0.0, abs=1e-6)
    assert rows[3]["policy/kl"] > 1e-6
    assert (tmp_path / "rollouts" / "reference.txt").exists()


def test_truncated_completions_can_be_left_out(tmp_path):
    once = {"batches": 1, "epochs": 1, "gather_weights": True}
    run(config_for(steps=1, mask_truncated=True, **once), tmp_path)
    row = rows_of(tmp_path)[1]
    assert row["rollout/truncated"] > 0.9  # an untrained model hardly ever ends
    assert row["rollout/completion_length"] > 3
    assert not list((tmp_path / "rollouts").glob("*.npz"))


def test_prompts_come_from_a_file_of_prompts_and_answers(tmp_path):
    rows = [{"prompt": f"After {n}?", "answer": f"{n + 1}"} for n in range(20)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = TextData(
        source=PairSource(str(file), source_field="prompt", target_field="answer"),
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.2,
        store=str(tmp_path / "store"),
        shards=1,
        prepare_processes=1,
    )
    config = config_for(steps=1, batches=1, epochs=1, sequence_length=20, data=data)
    outcome = run(config, tmp_path / "run", evaluate=True)
    lines = (tmp_path / "run" / "rollouts" / "step_00000000.jsonl").read_text().splitlines()
    assert {json.loads(line)["prompt"] for line in lines} <= {row["prompt"] for row in rows}
    assert "eval/reward" in outcome.metrics


def test_a_prompt_that_a_chat_template_rendered_is_read_as_chat_reads_it(tmp_path):
    files = llama3()
    files["tokenizer_config.json"]["chat_template"] = LLAMA3_TEMPLATE
    write(tmp_path / "tokenizer", files)
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    asked = [{"role": "user", "content": "2+3"}]
    rendered = template_of(tokenizer).render(asked, answer_next=True)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": rendered, "answer": "5"}))
    data = TextData(
        source=PairSource(
            str(tmp_path / "rows.jsonl"), source_field="prompt", target_field="answer", strip=False
        ),
        tokenizer=TokenizerConfig(path=str(tmp_path / "tokenizer")),
        validation_fraction=0.0,
        store=str(tmp_path / "store"),
        shards=1,
        prepare_processes=1,
    )
    config, prepared = config_for(data=data), prepare(data)
    examples = prepared.examples("train", config.objective.window_spec(256))
    prompt = prompt_of(examples.read(0, np.random.default_rng(0)), config, prepared, 256)
    assert prompt.text == rendered and rendered.endswith("\n\n")
    assert prompt.ids.tolist() == tokenizer.encode_prompt(rendered).tolist()
    assert prompt.ids.tolist().count(tokenizer.vocabulary.bos_id) == 1


@pytest.mark.parametrize(
    ("template", "length"),
    [
        (LLAMA3_TEMPLATE, 2),
        (None, 4),
        ("{{ raise_exception('tools alone') }}", 4),
        ("{% if", 4),
        ("{{ messages[-1].content }}", 4),
    ],
)
def test_completions_end_where_the_chat_template_ends_an_answer(template, length, tmp_path, caplog):
    """Of a base model the end of a turn is not the end token."""
    files = llama3()
    if template is not None:
        files["tokenizer_config.json"]["chat_template"] = template
    write(tmp_path / "llama3", files)
    tokenizer = load_tokenizer(tmp_path / "llama3")
    (end_of_turn,) = tokenizer.encode_prompt("<|eot_id|>")
    assert end_of_turn != tokenizer.vocabulary.eos_id
    sampled = [[5, end_of_turn, 6, tokenizer.vocabulary.eos_id]]

    class Sampled(Sampler):
        def _tokens(self, *_):
            return np.array(sampled)

    sampler = Sampled(
        build_model(config_for().model), None, tokenizer, tokenizer.vocabulary,
        rows=1, prompt_length=4, completion_length=4,
    )  # fmt: skip
    found = sampler(None, [Prompt(np.array([1]), "a", {})], None, jax.random.key(0))
    assert found.ids[0].tolist() == sampled[0][:length] and found.ended.all()
    fails = template is not None and ("raise" in template or template == "{% if")
    assert ("do not end at the end of a turn" in caplog.text) == fails


def test_each_batch_of_a_rollout_is_sampled_by_a_key_of_its_own():
    tokenizer, seen = ByteTokenizer(), []

    class Noted(Sampler):
        def _tokens(self, params, prompts, sampling, key):
            seen.append((jax.random.key_data(key).tolist(), [one.text for one in prompts]))
            return np.full((2, 3), 5)

    sampler = Noted(
        build_model(config_for().model), None, tokenizer, tokenizer.vocabulary,
        rows=2, prompt_length=4, completion_length=3,
    )  # fmt: skip
    prompts = [Prompt(np.array([1]), text, {}) for text in "abc"]
    found = sampler(None, prompts, None, jax.random.key(0))
    assert len(found.ids) == len(found.texts) == 3
    (first, texts), (second, rest) = seen
    assert (texts, rest) == (["a", "b"], ["c", "c"]) and first != second


def test_a_prompt_that_is_too_long_is_reported(tmp_path):
    config = config_for(data=Problems(task="copying", digits=12, training=50, held_out=6))
    message = "the prompt 'copy .*' has 19 tokens, of which phases.sequence_length 16 .* leave 12"
    with pytest.raises(UserError, match=message):
        run(config, tmp_path)


def test_a_rollout_that_does_not_divide_into_groups_is_refused(tmp_path):
    with pytest.raises(UserError, match="a rollout has 16 rows .* does not divide by"):
        run(config_for(group_size=3), tmp_path)


def test_other_seeds_sample_other_completions(straight, tmp_path):
    run(config_for(steps=1, seed=1), tmp_path)
    ours, theirs = (
        np.load(folder / "rollouts" / "step_00000000.npz")["labels"]
        for folder in (tmp_path, straight[0])
    )
    assert (ours != theirs).any()


def test_evaluation_sets_are_scored_by_their_rewards_which_are_loaded_once(tmp_path, monkeypatch):
    config, loaded = config_for(steps=1), []
    config = dataclasses.replace(config, phases=config.phases * 2)
    prepared = prepare(config.data)
    model = build_model(config.model)
    found = {}

    class Scores(ft.Callback):
        def on_evaluation(self, step, metrics):
            found.update(metrics)

    load = FunctionReward.scorer

    def scorer(reward, mesh):
        loaded.append(len(loaded))
        return load(reward, mesh)

    monkeypatch.setattr(FunctionReward, "scorer", scorer)
    scorers = {}
    sets = [("other", prepared)]
    chosen = evaluators(config, prepared, model, None, sets=sets, scorers=scorers)
    loop.train_prepared(
        config, prepared, tmp_path, chosen,
        callbacks=[Scores()], online=batch_source(config, None, scorers),
    )  # fmt: skip
    assert loaded == [0]
    assert found["eval/other/reward"] == found["eval/reward"]
    assert found["eval/other/odd"] == found["eval/odd"]
