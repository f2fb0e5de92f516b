"""Conversations in the terminal, and comparisons of two models."""

import contextlib
import io
import json
import sys

import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.cli.chat import ChatModel
from flax_transformers.cli.main import main
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.post_training.chat_template import ChatTemplate
from flax_transformers.post_training.judge import elo_difference
from tests.huggingface.tensors import drawn_model

pytestmark = pytest.mark.usefixtures("one_device")

SHORT = ["--max-new-tokens", "4"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two language models that differ, and a reward model."""
    path, found = tmp_path_factory.mktemp("models"), {}
    for name, architecture in (
        ("one", "LlamaForCausalLM"),
        ("other", "LlamaForCausalLM"),
        ("judge", "LlamaForSequenceClassification"),
    ):
        labels = {"num_labels": 1} if name == "judge" else {}
        ids = {"vocab_size": 262, "max_positions": 256, "eos_ids": (1,), "bos_id": None}
        model, params = drawn_model(architecture, **ids, pad_id=0, **labels)
        rng = np.random.default_rng(len(name))
        table = params["words"]["embedding"]
        params["words"]["embedding"] = rng.normal(size=table.shape).astype(np.float32)
        found[name] = str(path / name)
        ft.save_pretrained(found[name], model, params, tokenizer=ByteTokenizer())
    return found


def said(capsys, monkeypatch, *command, typed=""):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    assert main(list(command)) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_an_answer_is_what_generate_writes_after_the_template(folders, capsys, monkeypatch):
    found = said(capsys, monkeypatch, "chat", folders["one"], *SHORT, typed="Hi\nSure?\n\nNo\n")
    first, second = found.rstrip("\n").split("\n", 1)
    messages = [{"role": "user", "content": "Hi"}]
    for answer in (first, second):
        prompt = ChatTemplate().render(messages, answer_next=True)
        expected = said(capsys, monkeypatch, "generate", folders["one"], "--prompt", prompt, *SHORT)
        assert expected == f"{prompt}{answer}\n"
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": "Sure?"}]


@pytest.mark.slow
def test_a_reward_model_votes(folders, capsys, monkeypatch, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "votes.jsonl"
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("Hi", "a", "b")]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--prompts", str(prompts), "--judge", folders["judge"], "--output", str(output)]
    text = said(capsys, monkeypatch, "arena", folders["one"], folders["other"], *options, *SHORT)
    votes = [json.loads(line) for line in output.read_text().splitlines()]
    model, params = ft.load_pretrained(folders["judge"])
    apply = jax.jit(model.apply)
    for vote in votes:
        rewards = []
        for answer in vote["answers"]:
            whole = [*vote["messages"], {"role": "assistant", "content": answer}]
            ids = ByteTokenizer().encode_prompt(ChatTemplate().render(whole))
            padding = (0, 128 - len(ids))  # one program for answers of any length
            row, mask = np.pad(ids, padding), np.pad(np.ones_like(ids), padding)
            rewards.append(float(apply({"params": params}, row[None], mask[None]).logits[0, 0]))
        assert vote["first_is_better"] == (rewards[0] > rewards[1])
    wins = sum(vote["first_is_better"] for vote in votes)
    assert f"one: {wins:.0f} wins" in text and "Elo of the first above the second" in text


@pytest.mark.slow
def test_a_person_votes_without_knowing_whose_answer_it_is(folders, capsys, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("Hi\na\nb\n")
    command = [
        "arena",
        folders["one"],
        folders["other"],
        "--prompts",
        str(tmp_path / "prompts.txt"),
    ]
    swaps = np.random.default_rng(0).integers(2, size=3)
    typed = "".join(f"{2 if swap else 1}\n" for swap in swaps[:2])  # the first model's, both times
    output = said(capsys, monkeypatch, *command, *SHORT, typed=f"{typed}q\n")
    assert "one: 2 wins" in output and "other: 0 wins, 0 ties" in output


def test_equal_wins_are_no_difference_and_more_votes_narrow_the_interval():
    rng = np.random.default_rng(0)
    for count in (10, 1000):
        low, elo, high = elo_difference(np.array([1.0, 0.0] * count), rng)
        assert elo == 0 and low < 0 < high
    assert high - low < 50
    low, elo, high = elo_difference(np.array([1.0] * 3 + [0.0]), rng)
    assert elo == pytest.approx(400 * np.log10(3.5 / 1.5)) and low <= elo <= high


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ('{"text": "a"}', "prompts.jsonl:1 is no conversation"),
        ("{", "prompts.jsonl:1 is no conversation"),
        ("[1]", "prompts.jsonl:1 is no conversation"),
        ('{"instruction": 5}', "prompts.jsonl:1 is no conversation"),
        ('{"instruction": "\\ud800"}', "prompts.jsonl:1 is no conversation"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "has no message to answer"),
    ],
)
def test_a_file_of_prompts_with_a_mistake_is_named(rows, problem, folders, capsys, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(rows + "\n")
    options = ["--prompts", str(tmp_path / "prompts.jsonl")]
    assert main(["arena", folders["one"], folders["other"], *options]) == 2
    assert problem in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        (["--judge", "{one}"], "the judge is no reward model"),
        (["--judge", "{tmp}/missing"], "there is no directory"),
        (["--output", "{tmp}/missing/votes.jsonl"], "votes.jsonl cannot be written"),
        (["--template", "{tmp}/refuses.jinja"], "fails: no; change the messages, or give another"),
    ],
)
def test_mistakes_are_said_before_a_model_answers(
    option, problem, folders, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(ChatModel, "answers", lambda *_: pytest.fail("a model answers"))
    (tmp_path / "prompts.txt").write_text("Hi\n")
    (tmp_path / "refuses.jinja").write_text("{{ raise_exception('no') }}")
    option = [one.format(tmp=tmp_path, **folders) for one in option]
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    assert main(["arena", folders["one"], folders["other"], *prompts, *option, *SHORT]) == 2
    assert problem in capsys.readouterr().err


def test_votes_before_an_interrupt_are_kept(folders, monkeypatch, tmp_path):
    (tmp_path / "prompts.txt").write_text("Hi\na\nb\n")
    monkeypatch.setattr(ChatModel, "load", lambda *_: None)
    monkeypatch.setattr(ChatModel, "answers", lambda _, conversations: ["A"] * len(conversations))
    typed = iter(["1", "2"])

    def answered(_):
        try:
            return next(typed)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("builtins.input", answered)
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "votes")]
    with contextlib.suppress(KeyboardInterrupt):
        main(["arena", folders["one"], folders["other"], *options])
    votes = [json.loads(line) for line in (tmp_path / "votes").read_text().splitlines()]
    assert [vote["messages"][0]["content"] for vote in votes] == ["Hi", "a"]


def test_a_template_that_refuses_ends_chat_with_a_sentence(folders, capsys, tmp_path):
    (tmp_path / "refuses.jinja").write_text("{{ raise_exception('no') }}")
    assert main(["chat", folders["one"], "--template", str(tmp_path / "refuses.jinja")]) == 2
    assert "fails: no; change the messages" in capsys.readouterr().err
