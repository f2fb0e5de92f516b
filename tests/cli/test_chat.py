"""Conversations in the terminal, and comparisons of two models."""

import contextlib
import io
import json
import shutil
import sys

import jax
import numpy as np
import pytest

import flax_transformers as ft
from flax_transformers.cli.chat import Arena, Asked, ChatModel, _conversations, _opened
from flax_transformers.cli.main import main
from flax_transformers.data.tokenizers.kinds import ByteTokenizer
from flax_transformers.post_training import judge
from flax_transformers.post_training.chat_data import encode
from flax_transformers.post_training.chat_template import ChatTemplate
from flax_transformers.post_training.conversations import conversation
from flax_transformers.post_training.judge import elo_difference, judged_rewards
from tests.cli.test_generate import WORDS, tokenizer_with_added_padding
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
        ("short", "LlamaForSequenceClassification"),
    ):
        labels = {"num_labels": 1} if name in ("judge", "short") else {}
        ids = {"vocab_size": 262, "eos_ids": (1,), "bos_id": None}
        ids["max_positions"] = 67 if name == "short" else 256
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


@pytest.mark.parametrize("written", [True, False])
def test_answers_that_the_judge_refuses_are_not_lost(
    written, folders, capsys, monkeypatch, tmp_path
):
    (tmp_path / "prompts.txt").write_text("Hi\n")
    options = ["--prompts", str(tmp_path / "prompts.txt"), "--judge", folders["short"]]
    options += ["--output", str(tmp_path / "votes")] if written else []
    monkeypatch.setattr(ChatModel, "load", lambda *_: None)
    # The judge reads each character that cannot be decoded as three tokens.
    monkeypatch.setattr(ChatModel, "answers", lambda *_: ["\ufffd" * 4])
    assert main(["arena", folders["one"], folders["other"], *options, *SHORT]) == 2
    printed = capsys.readouterr()
    assert "has 75 tokens, but the judge takes 67" in printed.err
    (line,) = ((tmp_path / "votes").read_text() if written else printed.out).splitlines()
    assert json.loads(line) == {
        "messages": [{"role": "user", "content": "Hi"}],
        "answers": ["\ufffd" * 4] * 2,
        "first_is_better": None,
    }


@pytest.mark.slow
def test_a_judge_of_plain_texts_reads_no_template(folders, capsys, monkeypatch, tmp_path):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "votes.jsonl"
    prompts.write_text("Hi\n")
    options = ["--prompts", str(prompts), "--judge", folders["judge"], "--judge-texts"]
    options += ["--output", str(output)]
    read = []
    monkeypatch.setattr(ChatModel, "load", lambda *_: None)
    monkeypatch.setattr(ChatModel, "answers", lambda *_: ["A"])
    monkeypatch.setattr(judge, "judged_rewards", lambda *given: read.append(given[2]) or np.ones(1))
    assert "1 ties" in said(
        capsys, monkeypatch, "arena", folders["one"], folders["other"], *options, *SHORT
    )
    document = conversation({"prompt": "Hi", "completion": "A"})
    (expected,), _ = encode(document, ChatTemplate(), ft.load_tokenizer(folders["judge"]))
    assert read == [[expected.tolist()]] * 2 and expected[-1] == 1


@pytest.mark.slow
def test_the_models_before_a_judge_of_plain_texts_continue_the_question(
    folders, capsys, monkeypatch, tmp_path
):
    prompts, output, file = (tmp_path / name for name in ("prompts.txt", "votes", "own.jinja"))
    prompts.write_text("Hi\n")
    options = ["--prompts", str(prompts), "--judge", folders["judge"], "--judge-texts", *SHORT]
    options += ["--output", str(output)]
    monkeypatch.setattr(judge, "judged_rewards", lambda *given: np.ones(1))
    said(capsys, monkeypatch, "arena", folders["one"], folders["other"], *options)
    answers = json.loads(output.read_text())["answers"]
    for name, answer in zip(("one", "other"), answers, strict=True):
        found = said(capsys, monkeypatch, "generate", folders[name], "--prompt", "Hi", *SHORT)
        assert found == f"Hi{answer}\n"
    asked = []

    def answers_of(model, conversations):
        asked.append(model.encoded(conversations[0].messages))
        return ["A"]

    monkeypatch.setattr(ChatModel, "load", ChatModel.check)
    monkeypatch.setattr(ChatModel, "answers", answers_of)
    file.write_text("{{ messages[0].content }}: ")
    options += ["--template", str(file)]
    said(capsys, monkeypatch, "arena", folders["one"], folders["other"], *options)
    assert asked == [ByteTokenizer().encode_prompt("Hi: ").tolist()] * 2


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
        ('{"prompt": 3}', "prompts.jsonl:1 is no conversation"),
        ('{"prompt": ""}', "has no message to answer"),
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
    ("row", "messages"),
    [
        ({"prompt": "Hi", "answer": 1}, [("user", "Hi")]),
        ("Hi", [("user", "Hi")]),
        ({"prompt": "Hi", "system": "Be brief."}, [("system", "Be brief."), ("user", "Hi")]),
        ({"prompt": [{"role": "user", "content": "Hi"}]}, [("user", "Hi")]),
        ({"prompt": "Hi", "completion": "Yes?"}, [("user", "Hi")]),
        ({"prompt": "Hi", "chosen": "Yes?", "rejected": "No"}, [("user", "Hi")]),
        ({"instruction": "Hi", "output": "Yes?"}, [("user", "Hi")]),
    ],
)
def test_prompts_may_be_those_of_generate(row, messages, tmp_path):
    (tmp_path / "prompts.jsonl").write_text(json.dumps(row) + "\n")
    (asked,) = _conversations(str(tmp_path / "prompts.jsonl"))
    assert [(one["role"], one["content"]) for one in asked.messages] == messages


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        (["--judge", "{one}"], "the judge is no reward model"),
        (["--judge", "{tmp}/missing"], "there is no directory"),
        (["--judge-texts"], "give both, or neither"),
        (
            ["--judge", "{judge}", "--judge-texts", "--prompts", "{tmp}/system.jsonl"],
            "conversation 1 of .*system.jsonl has the messages system, user, but",
        ),
        (
            ["--judge", "{short}"],
            "conversation 2 of .*prompts.txt has 65 tokens for the judge, which takes 67 with the "
            "answer, of at most 4; set --max-new-tokens 2, or leave it out, or give another judge",
        ),
        (["--output", "{tmp}/missing/votes.jsonl"], "votes.jsonl cannot be written"),
        (["--template", "{tmp}/refuses.jinja"], "fails: no; change the messages, or give another"),
    ],
)
def test_mistakes_are_said_before_a_model_answers(
    option, problem, folders, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(ChatModel, "answers", lambda *_: pytest.fail("a model answers"))
    (tmp_path / "prompts.txt").write_text("Hi\nHow?\n")
    (tmp_path / "system.jsonl").write_text('{"system": "Be brief.", "prompt": "Hi"}')
    (tmp_path / "refuses.jinja").write_text("{{ raise_exception('no') }}")
    option = [one.format(tmp=tmp_path, **folders) for one in option]
    prompts = ["--prompts", str(tmp_path / "prompts.txt")]
    assert main(["arena", folders["one"], folders["other"], *prompts, *option, *SHORT]) == 2
    assert problem.replace(".*", f"{tmp_path}/") in capsys.readouterr().err


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


def test_input_that_is_not_utf8_ends_chat_with_a_sentence(folders, capsys, monkeypatch):
    typed = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", typed)
    assert main(["chat", folders["one"], *SHORT]) == 2
    assert "the input is not UTF-8; convert it" in capsys.readouterr().err


@pytest.mark.slow
def test_chat_answers_by_the_beams_of_a_models_settings(folders, capsys, monkeypatch, tmp_path):
    folder = str(shutil.copytree(folders["one"], tmp_path / "beams"))
    settings = tmp_path / "beams" / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"num_beams": 2}))
    prompt = ChatTemplate().render([{"role": "user", "content": "Hi"}], answer_next=True)
    expected = said(capsys, monkeypatch, "generate", folder, "--prompt", prompt, *SHORT)
    found = said(capsys, monkeypatch, "chat", folder, *SHORT, typed="Hi\n")
    assert prompt + found.rstrip("\n") == expected.rstrip("\n")


@pytest.mark.slow
def test_equal_prompts_in_several_batches_get_texts_of_their_own(folders, capsys, monkeypatch):
    prompts = ["--prompt", "a", "--prompt", "a", "--batch-size", "1", "--temperature", "1"]
    found = said(capsys, monkeypatch, "generate", folders["one"], *prompts)
    both = found.removesuffix("\n")
    half = len(both) // 2  # equal samples are equal halves around a line feed
    assert both[:half] != both[half + 1 :]


def test_templates_get_the_tools_of_a_conversation(folders, monkeypatch, tmp_path):
    asked = {"messages": [{"role": "user", "content": "Hi"}], "tools": [{"name": "search"}]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(asked))
    (tmp_path / "names.jinja").write_text(
        "{{ (tools or ['none'])[0].name }} {{ messages[0].content }}"
    )
    written = []

    def answers(model, conversations):
        found = [model.encoded(one.messages, one.tools) for one in conversations]
        written.extend(map(ByteTokenizer().decode, found))
        return ["A"] * len(conversations)

    monkeypatch.setattr(ChatModel, "load", ChatModel.check)
    monkeypatch.setattr(ChatModel, "answers", answers)
    monkeypatch.setattr("builtins.input", lambda _: "1")
    options = ["--template", str(tmp_path / "names.jinja"), *SHORT]
    prompts = ["--prompts", str(tmp_path / "prompts.jsonl")]
    assert main(["arena", folders["one"], folders["other"], *prompts, *options]) == 0
    assert written == ["search Hi", "search Hi"]


def test_a_judge_reads_texts_up_to_its_last_position():
    model, params = drawn_model(
        "GPT2ForSequenceClassification", vocab_size=262, max_positions=90, num_labels=1, pad_id=0
    )
    texts = (ByteTokenizer().encode_prompt(text).tolist() for text in ("a" * 80, "b" * 70))
    rewards = judged_rewards(model, params, list(texts), 2)
    assert np.isfinite(rewards).all() and rewards[0] != rewards[1]


def test_a_judge_whose_tokenizer_has_a_padding_token_that_the_model_lacks_votes(tmp_path):
    tokenizer_with_added_padding(tmp_path / "tokenizer")
    labels = {"vocab_size": len(WORDS), "num_labels": 1, "pad_id": -1}
    model, params = drawn_model("GPT2ForSequenceClassification", **labels)
    judge = str(tmp_path / "judge")
    ft.save_pretrained(judge, model, params, tokenizer_from=tmp_path / "tokenizer")
    arena = Arena("one", "other", "prompts.txt", judge_texts=True)
    asked = [Asked([{"role": "user", "content": text}]) for text in ("a", "b c")]
    votes = arena._judged(judge, asked, [[" d", " e d c"], [" e", " d a"]])
    assert set(votes) <= {0.0, 1.0}


@pytest.mark.slow
def test_an_encoder_decoder_answers_what_generate_writes(capsys, monkeypatch, tmp_path):
    ids = {"vocab_size": 262, "max_positions": 128, "eos_ids": (1,), "pad_id": 0}
    model, params = drawn_model("BartForConditionalGeneration", **ids, decoder_start_id=0)
    ft.save_pretrained(tmp_path / "bart", model, params, tokenizer=ByteTokenizer())
    new = ["--max-new-tokens", "60"]  # with the source more than the positions of either side
    asked = "a" * 20
    prompt = ChatTemplate().render([{"role": "user", "content": asked}], answer_next=True)
    folder = str(tmp_path / "bart")
    expected = said(capsys, monkeypatch, "generate", folder, "--prompt", prompt, *new)
    assert said(capsys, monkeypatch, "chat", folder, *new, typed=f"{asked}\n") == expected


def test_votes_may_be_written_to_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with _opened("~/votes.jsonl", "w") as file:
        assert file.name == str(tmp_path / "votes.jsonl")
