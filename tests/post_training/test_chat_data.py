"""Stores of conversations: what is learned, packed, cut and left out."""

import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest

from flax_transformers.data.base import EvaluationSet
from flax_transformers.data.config import TextData
from flax_transformers.data.dataset import prepare, training_examples
from flax_transformers.data.sources.text import TextSource
from flax_transformers.data.tokenizers.load import TokenizerConfig, load_tokenizer
from flax_transformers.errors import UserError
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.rows import end_id
from flax_transformers.post_training.chat_data import ChatData, ConversationSpec, encode
from flax_transformers.post_training.chat_template import ChatTemplate, TemplateError, template_of
from flax_transformers.post_training.conversations import (
    ConversationSource,
    conversation,
    embedded_rows,
)
from flax_transformers.post_training.preference import DirectPreference
from flax_transformers.post_training.problems import Problems
from flax_transformers.post_training.reward_model import RewardModel
from flax_transformers.post_training.supervised import (
    SupervisedEncoderDecoder,
    SupervisedFineTuning,
)
from tests.golden.tokenizer_layouts import llama3, write
from tests.objectives.test_streams import BATCH, batches, joined, over_hosts

RNG = np.random.default_rng(0)
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<{{ m.content }}>"
    "{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<{% endif %}"
)


def turns(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": one} for i, one in enumerate(contents)]


def data(folder, rows, **settings):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "template.jinja").write_text(TEMPLATE)
    settings.setdefault("template_path", str(folder / "template.jinja"))
    settings.setdefault("source", ConversationSource(str(folder / "rows.jsonl")))
    return ChatData(
        tokenizer=TokenizerConfig("bytes"),
        validation_fraction=0.0,
        shards=1,
        **settings,
    )


def prepared(folder, rows, **settings):
    return prepare(data(folder, rows, **settings), folder / "store")


def test_stores_of_conversations_are_named_by_what_is_learned(tmp_path, monkeypatch):
    rows = [{"messages": turns("a", "b")}]
    names = set()
    for version in (1, 2):
        monkeypatch.setattr(ConversationSource, "store_version", version)
        names.add(data(tmp_path, rows).origin.identity)
    assert len(names) == 2


def rows_of(store, objective, length):
    examples = store.examples("train", objective.window_spec(length))
    raw = [examples.read(i, RNG) for i in range(len(examples))]
    return [objective.prepare(one, RNG, store.vocabulary, length) for one in raw]


def text(store, ids):
    return store.tokenizer.decode(ids.tolist())


def learned_of(store, row):
    return text(store, np.roll(row["input_ids"], -1)[row["label_weights"] > 0])


CONVERSATIONS = [
    {"messages": turns("ab", "cd", "e", "f")},
    {"messages": turns("gh", "ij")},
    {"messages": turns("k" * 40, "too late")},
]


def test_the_next_tokens_of_assistant_turns_are_learned_in_packed_rows(tmp_path, caplog):
    store = prepared(tmp_path, CONVERSATIONS)
    (row,) = rows_of(store, SupervisedFineTuning(), 32)
    assert "1 of 3 conversations" in caplog.text and "are left out, 0 are cut" in caplog.text
    used = row["segment_ids"] > 0
    assert text(store, row["input_ids"][used]) in (
        "[ab]<cd>[e]<f>[gh]<ij>",
        "[gh]<ij>[ab]<cd>[e]<f>",
    )
    assert sorted(np.bincount(row["segment_ids"])[1:]) == [8, 14]
    assert sorted(learned_of(store, row)) == sorted("<cd><f><ij>")
    # What precedes a learned token is of the same segment.
    at = np.flatnonzero(row["label_weights"])
    assert (row["segment_ids"][at] == row["segment_ids"][at + 1]).all()
    assert (row["labels"][at] == row["input_ids"][at + 1]).all()


@pytest.mark.parametrize("tags", [True, False])
def test_turns_of_weight_zero_are_not_learned(tags, tmp_path):
    rows = [{"messages": turns("ab", "cd", "e", "f", "g", "hi")}]
    rows[0]["messages"][1]["weight"] = 0
    rows[0]["messages"][3] |= {"weight": 1}
    source = ConversationSource(str(tmp_path / "rows.jsonl"))
    untagged = re.sub("{% (end)?generation %}", "", TEMPLATE)
    (tmp_path / "own.jinja").write_text(TEMPLATE if tags else untagged)
    template = {"template_path": str(tmp_path / "own.jinja")}
    store = prepared(tmp_path, rows, **template)
    (row,) = rows_of(store, SupervisedFineTuning(), 32)
    assert learned_of(store, row) == ("<f><hi>" if tags else "f>hi>")
    for message in rows[0]["messages"]:
        message["weight"] = 0
    with pytest.raises(UserError, match="has no assistant turn to learn from"):
        prepare(data(tmp_path, rows, source=source, **template), tmp_path / "none")
    rows[0]["messages"][1]["weight"] = 0.5
    with pytest.raises(UserError, match=r"has a message of the weight 0\.5; give 0 or 1"):
        prepare(data(tmp_path, rows, source=source, **template), tmp_path / "half")


def test_weights_need_a_template_that_marks_each_turn():
    marked = "{% generation %}{% for m in messages %}{{ m.content }}{% endfor %}{% endgeneration %}"
    messages = [{**one, "weight": 0} for one in turns("a", "b", "c", "d")]
    with pytest.raises(TemplateError, match="marks 1 parts of 2 assistant turns"):
        ChatTemplate(marked).rendered(messages)


def test_a_conversation_is_cut_after_the_last_whole_turn(tmp_path, caplog):
    store = prepared(tmp_path, CONVERSATIONS[:1])
    for length, whole in ((14, "<cd><f>"), (13, "<cd>"), (8, "<cd>")):
        (row,) = rows_of(store, SupervisedFineTuning(), length)
        assert learned_of(store, row) == whole
    assert "1 are cut after an assistant turn" in caplog.text
    with pytest.raises(
        UserError, match="None of the 1 .* assistant turn that ends within 7 tokens"
    ):
        store.examples("train", ConversationSpec(7, True))


def test_without_packing_each_conversation_is_a_row(tmp_path):
    store = prepared(tmp_path, CONVERSATIONS[:2])
    rows = rows_of(store, SupervisedFineTuning(cross_documents=False), 32)
    assert sorted(learned_of(store, row) for row in rows) == ["<cd><f>", "<ij>"]


@pytest.mark.parametrize("packed", [True, False])
def test_conversations_are_chosen_before_they_are_packed(packed, tmp_path):
    rows = [{"messages": turns(f"{i:02d}", f"{i:02d}")} for i in range(30)]
    few = data(tmp_path, rows, max_training_examples=3)
    spec = ConversationSpec(32, packed)
    found = training_examples(prepare(few, tmp_path / "store"), spec, few, 5)
    again = pickle.loads(pickle.dumps(found))
    for examples in (found, again):
        chosen = [len(examples.read(i, RNG)["ends"]) for i in range(len(examples))]
        assert chosen == ([3] if packed else [1, 1, 1])
    more = training_examples(
        prepare(few, tmp_path / "store"), spec, replace(few, max_training_examples=9), 5
    )
    assert set(found.documents) < set(more.documents)


def test_an_encoder_decoder_learns_the_last_turn(tmp_path):
    store = prepared(tmp_path, CONVERSATIONS[:1])
    (row,) = rows_of(store, SupervisedEncoderDecoder(target_length=6), 16)
    end = end_id(store.vocabulary)
    assert row["input_ids"][:12].tolist()[-1] == end
    assert text(store, row["input_ids"]) == "[ab]<cd>[e]"
    assert text(store, row["labels"]) == "<f>" and row["labels"][3] == end
    assert row["weights"].sum() == 4
    (row,) = rows_of(store, SupervisedEncoderDecoder(target_length=6), 10)  # the first one fits
    assert text(store, row["labels"]) == "<cd>"


PAIRS = [
    {"prompt": turns("ab"), "chosen": turns("", "cd")[1:], "rejected": turns("", "e")[1:]},
    {"prompt": turns("f"), "completions": ["g", "h", "i"], "scores": [2, 2, 1]},
]


def test_completions_of_a_prompt_are_compared_in_one_row(tmp_path):
    store = prepared(tmp_path, PAIRS)
    objective = RewardModel(completions=5)
    (row,) = rows_of(store, objective, 64)
    used = row["segment_ids"] > 0
    lengths = np.bincount(row["segment_ids"])[1:]
    assert row["ends"].tolist() == np.cumsum(lengths).tolist() and used.sum() == lengths.sum()
    np.testing.assert_allclose(row["preferred"].sum(), 2, rtol=1e-6)
    weights = sorted(row["preferred"][row["preferred"] > 0].tolist())
    assert weights == [0.5, 0.5, 1.0]  # two pairs of the triple, of which two are equal
    # The prompt and what the answers begin with are not learned.
    assert sorted(learned_of(store, row)) == sorted("cd>e>g>h>i>")
    assert len(rows_of(store, RewardModel(completions=3), 64)) == 2


LAST = (
    "{% for m in messages %}{% if m.role == 'user' %}{% if loop.last and messages[1:] %}"
    "[{{ messages[0].content }}.{{ m.content }}]{% else %}[{{ m.content }}]{% endif %}"
    "{% elif m.role == 'assistant' %} {{ m.content|trim }}~{% endif %}{% endfor %}"
)
"""Writes the system message in a user's turn that is the last, as Mistral's templates do."""


def test_only_completions_are_learned_where_a_prompt_is_written_otherwise_at_the_end(tmp_path):
    system = [{"role": "system", "content": "s"}, *turns("ask")]
    answers = {
        "chosen": [*system, {"role": "assistant", "content": "yes"}],
        "rejected": [*system, {"role": "assistant", "content": "not"}],
    }
    completion = {"prompt": system, "completion": answers["chosen"][-1:]}
    (tmp_path / "last.jinja").write_text(LAST)
    for number, (row, objective) in enumerate(
        [(answers, DirectPreference()), (completion, SupervisedFineTuning())]
    ):
        settings = data(tmp_path, [row], template_path=str(tmp_path / "last.jinja"))
        store = prepare(settings, tmp_path / str(number))
        (example,) = rows_of(store, objective, 32)
        found = "yes~not~" if objective == DirectPreference() else "yes~"
        assert learned_of(store, example) == found


def test_preferences_that_do_not_fit_are_left_out(tmp_path, caplog):
    store = prepared(tmp_path, PAIRS)
    (row,) = rows_of(store, RewardModel(), 64)  # at most two completions
    assert row["preferred"].tolist() == [[0, 1], [0, 0]]
    assert "1 of 2 conversations" in caplog.text
    with pytest.raises(UserError, match="None of the 2 conversations .* two completions"):
        rows_of(store, RewardModel(), 10)


def test_the_best_answer_is_learned_from_preferences(tmp_path):
    rows = rows_of(prepared(tmp_path, PAIRS), SupervisedFineTuning(cross_documents=False), 64)
    assert len(rows) == 2


def test_a_row_of_preferences_without_a_reference_is_not_finite(tmp_path):
    store = prepared(tmp_path, PAIRS[:1])
    (row,) = rows_of(store, DirectPreference(), 64)
    assert np.isnan(row["reference"]).all()


def test_plain_texts_have_no_template_and_end(tmp_path):
    store = prepared(tmp_path, [{"prompt": "ab", "completion": "cd"}])
    (row,) = rows_of(store, SupervisedFineTuning(), 8)
    assert text(store, row["input_ids"]) == "abcd" and learned_of(store, row) == "cd"
    assert row["label_weights"].sum() == 3


def test_plain_texts_begin_with_one_start_token_also_if_they_name_it(tmp_path):
    write(tmp_path / "llama3", llama3())
    tokenizer = load_tokenizer(tmp_path / "llama3")
    ids = []
    for start in ("", "<|begin_of_text|>"):
        row = {"prompt": f"{start}All human", "completion": " beings"}
        (found,), spans = encode(conversation(row), ChatTemplate(), tokenizer)
        ids.append((found.tolist(), spans))
    assert ids[0] == ids[1] and ids[0][0].count(tokenizer.vocabulary.bos_id) == 1


def test_the_template_is_saved_with_the_tokenizer(tmp_path):
    store = prepared(tmp_path, CONVERSATIONS)
    store.tokenizer.save(tmp_path / "saved")
    assert template_of(load_tokenizer(tmp_path / "saved")).source == TEMPLATE


def test_another_template_makes_another_store(tmp_path):
    prepared(tmp_path, CONVERSATIONS)
    other = tmp_path / "other.jinja"
    other.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="was made with template="):
        prepared(tmp_path, CONVERSATIONS, template_path=str(other))


def test_a_conversation_that_the_template_refuses_is_named_or_skipped(tmp_path):
    refusing = tmp_path / "refusing.jinja"
    refusing.write_text(
        "{% if messages[0].content == 'gh' %}{{ raise_exception('no gh') }}{% endif %}x"
    )
    source = ConversationSource(str(tmp_path / "rows.jsonl"))
    given = {"template_path": str(refusing), "source": source}
    with pytest.raises(UserError, match=r"rows.jsonl:2 cannot be rendered: .* fails: no gh;"):
        prepared(tmp_path, CONVERSATIONS, **given)
    skipping = ConversationSource(str(tmp_path / "rows.jsonl"), on_invalid="skip")
    store = prepare(
        data(tmp_path, CONVERSATIONS, **given | {"source": skipping}), tmp_path / "other"
    )
    assert store.train.num_documents == 2


def test_other_objectives_and_other_data_are_refused(tmp_path):
    chat = data(tmp_path, CONVERSATIONS)
    with pytest.raises(UserError, match="CausalLM does not learn from conversations"):
        chat.check_objective("CausalLM", CausalLM().window_spec(8))
    with pytest.raises(UserError, match="SupervisedFineTuning learns from ChatData"):
        TextData(source=TextSource()).check_objective(
            "SupervisedFineTuning", SupervisedFineTuning().window_spec(8)
        )


def test_an_evaluation_set_of_conversations_is_held_out_as_a_whole(tmp_path):
    chat = data(tmp_path, CONVERSATIONS)
    one = EvaluationSet("same", chat.source)
    store = prepare(chat.of_evaluation_set(one), tmp_path / "set")
    assert store.validation.num_documents == 3 and store.train.num_documents == 0


def test_embedded_preferences_have_a_right_and_a_wrong_answer():
    rows = list(embedded_rows(60))
    assert len({row["prompt"][0]["content"] for row in rows}) == 60
    assert all(row["chosen"] != row["rejected"] for row in rows)
    assert rows == list(embedded_rows(60))


def test_preferences_can_be_generated_problems_of_which_none_is_held_out(tmp_path):
    problems = Problems(task="sorting", digits=2, training=60, held_out=20)
    source = ConversationSource("embedded", problems=problems)
    chat = ChatData(
        source=source, tokenizer=TokenizerConfig("bytes"), validation_fraction=0.1, shards=1
    )
    store = prepare(chat, tmp_path / "store")
    rows = [json.loads(text) for text in source.embedded_texts()]
    assert store.train.num_documents + store.validation.num_documents == len(rows) <= 60
    held_out = problems.items()[1]
    assert not {row["prompt"] for row in rows} & {held_out.problem(n)[0] for n in range(20)}
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        digits = row["prompt"].removeprefix("sort ").removesuffix("=")
        assert row["chosen"] == "".join(sorted(digits)) != row["rejected"]


def test_problems_are_generated_and_not_read():
    with pytest.raises(UserError, match='set the path to "embedded", or leave out the problems'):
        ConversationSource("chats.jsonl", problems=Problems())


def test_rows_do_not_depend_on_hosts_or_a_resume(tmp_path):
    objective = RewardModel(completions=3, cross_documents=False)
    store = prepared(tmp_path, PAIRS * 8)
    expected = joined(batches(store, objective, 12))
    found = [
        *over_hosts(2, store, objective, 5),
        *over_hosts(4, store, objective, 7, position=5 * BATCH),
    ]
    for name, values in joined(found).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


@pytest.mark.parametrize(
    "objective",
    [SupervisedFineTuning(), RewardModel(), DirectPreference(), SupervisedEncoderDecoder()],
)
def test_the_dummy_example_has_the_shapes_of_real_ones(objective, tmp_path):
    chat = data(tmp_path, PAIRS)
    spec, store = objective.window_spec(64), prepare(chat, tmp_path / "store")
    dummy = objective.prepare(chat.dummy_example(spec, 70), RNG, store.vocabulary, 64)
    (row, *_) = rows_of(store, objective, 64)
    for name, values in row.items():
        assert (values.shape, values.dtype) == (dummy[name].shape, dummy[name].dtype)
    assert all(np.isfinite(values).all() for values in dummy.values())
