"""From step reports to rows of metrics."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_transformers.adapters.lora import LoraConfig
from flax_transformers.errors import UserError
from flax_transformers.families.mistral import MistralConfig
from flax_transformers.families.modernbert import ModernBertConfig
from flax_transformers.families.t5 import T5Config
from flax_transformers.monitoring import throughput
from flax_transformers.monitoring.goodput import Clock
from flax_transformers.monitoring.model_flops import step_flops
from flax_transformers.monitoring.throughput import StepReport
from flax_transformers.multiple_choice.objective import MultipleChoice
from flax_transformers.objectives.causal_lm import CausalLM
from flax_transformers.objectives.question_answering import QuestionAnswering
from flax_transformers.objectives.sequence_classification import SequenceClassification
from flax_transformers.objectives.sequence_to_sequence import SequenceToSequence
from flax_transformers.objectives.token_classification import TokenClassification
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.parallel.mesh import MeshConfig, make_mesh
from flax_transformers.testing import tiny_architecture, tiny_bert, tiny_config
from flax_transformers.training.setup import make_step_metrics, phase_flops, shapes_and_axes

CONFIG = tiny_config(
    "text.txt",
    "store",
    optimizer=AdamW(learning_rate=1.0, schedule=Schedule("linear", warmup_steps=10)),
    max_consecutive_skips=2,
)


MEANS = {"train/loss", "optimizer/grad_norm"}


def new_step_metrics(config=CONFIG, totals=None):
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    return make_step_metrics(config, config.phases[0], mesh, Clock(), totals)


def good(loss=(2.0, 1.0), grad_norm=1.0, skipped=0, tokens=0):
    sums = {"loss": tuple(map(np.float32, loss))}
    return StepReport(
        sums, np.float32(grad_norm), np.int32(skipped), np.int32(0), tokens=np.int32(tokens)
    )


def bad(skipped, in_a_row):
    sums = {"loss": (np.float32(0), np.float32(0))}
    return StepReport(sums, np.float32(np.nan), np.int32(skipped), np.int32(in_a_row))


def feed(step_metrics, *reports):
    """As the loop does: the report before is fetched after the next step is sent."""
    for report in reports:
        step_metrics.fetch_previous()
        step_metrics.sent(report)


def test_a_row_is_total_over_total_since_the_row_before():
    step_metrics = new_step_metrics()
    feed(step_metrics, good((10.0, 4.0), grad_norm=1.0), good((2.0, 8.0), grad_norm=4.0))
    row = step_metrics.row(2)
    assert (row["train/loss"], row["optimizer/grad_norm"]) == (1.0, 2.5)
    feed(step_metrics, good((6.0, 2.0), grad_norm=3.0))
    row = step_metrics.row(3)
    assert (row["train/loss"], row["optimizer/grad_norm"]) == (3.0, 3.0)


def test_a_skipped_step_counts_in_no_mean_and_is_told(caplog):
    step_metrics = new_step_metrics()
    feed(
        step_metrics,
        good((2.0, 4.0)),
        bad(1, 1),
        bad(2, 2),
        good((6.0, 4.0), grad_norm=3.0, skipped=2),
    )
    row = step_metrics.row(4)
    assert (row["train/loss"], row["optimizer/grad_norm"]) == (1.0, 2.0)
    assert row["optimizer/skipped_steps"] == 2
    assert caplog.messages == ["a step was skipped: its gradients are not finite"] * 2


def test_steps_skipped_before_a_restart_are_not_told_again(caplog):
    step_metrics = new_step_metrics()
    feed(step_metrics, good(skipped=5))
    assert step_metrics.row(9)["optimizer/skipped_steps"] == 5
    assert not caplog.messages


def test_a_row_of_skipped_steps_alone_has_no_loss():
    step_metrics = new_step_metrics()
    feed(step_metrics, bad(1, 1))
    assert not {"train/loss", "optimizer/grad_norm"} & step_metrics.row(1).keys()


def test_one_skipped_step_in_a_row_more_than_allowed_ends_the_run():
    step_metrics = new_step_metrics()
    feed(step_metrics, bad(1, 1), bad(2, 2), good(skipped=2), bad(3, 1), bad(4, 2), bad(5, 3))
    with pytest.raises(UserError, match="gradients of 3 steps in a row are not finite; lower"):
        step_metrics.row(6)


def test_a_run_whose_first_steps_are_not_finite_is_told_from_one_that_diverges():
    step_metrics = new_step_metrics()
    feed(step_metrics, *(dataclasses.replace(bad(n, n), updates=0) for n in (1, 2, 3)))
    with pytest.raises(UserError, match="of the first 3 steps are not finite, and no update .* at"):
        step_metrics.row(3)


@pytest.mark.parametrize("limit", [0, 1, 20])
def test_as_many_steps_in_a_row_as_the_limit_may_be_skipped_and_one_more_may_not(limit):
    step_metrics = new_step_metrics(dataclasses.replace(CONFIG, max_consecutive_skips=limit))
    feed(step_metrics, *(bad(n, n) for n in range(1, limit + 1)), good(skipped=limit))
    step_metrics.row(limit + 1)
    feed(step_metrics, *(bad(limit + n, n) for n in range(1, limit + 2)))
    with pytest.raises(UserError, match=(
        f"gradients of {limit + 1} steps in a row are not finite; .*: {limit} steps in a row may "
        r"be skipped \(max_consecutive_skips\)"
    )):  # fmt: skip
        step_metrics.fetch_previous()


def test_an_update_that_would_not_be_finite_is_told_apart_from_gradients(caplog):
    step_metrics = new_step_metrics()
    report = dataclasses.replace(bad(1, 1), grad_norm=np.float32(1), update_is_finite=False)
    feed(step_metrics, report)
    step_metrics.row(1)
    assert caplog.messages == [
        "a step was skipped: its new parameters or optimizer statistics are not finite"
    ]
    assert (step_metrics.consecutive_skips, step_metrics.diverging_steps) == (1, 1)


def test_a_spike_is_skipped_and_is_no_divergence():
    step_metrics = new_step_metrics()
    feed(step_metrics, dataclasses.replace(bad(1, 1), grad_norm=np.float32(70)))
    step_metrics.row(1)
    assert (step_metrics.consecutive_skips, step_metrics.diverging_steps) == (1, 0)
    feed(step_metrics, good(skipped=1))
    step_metrics.row(2)
    assert (step_metrics.consecutive_skips, step_metrics.diverging_steps) == (0, 0)


def test_a_meter_that_resumes_averages_what_the_one_before_had_collected():
    reports = [good((0.1, 4.0), 0.3), bad(1, 1), good((2.3, 8.0), 4.0, 1), good((5.7, 1.0), 2.0, 1)]
    straight, first = new_step_metrics(), new_step_metrics()
    feed(straight, *reports)
    feed(first, *reports[:2])
    first.fetch_previous()
    totals = json.loads(json.dumps(first.totals))
    assert new_step_metrics().totals == {}
    second = new_step_metrics(totals=totals)
    feed(second, *reports[2:])
    means = [
        {name: value for name, value in step_metrics.row(4).items() if name in MEANS}
        for step_metrics in (straight, second)
    ]
    assert means[0] == means[1]
    assert means[0].keys() == MEANS


def test_the_learning_rate_is_that_of_the_last_update_made():
    """It rises by a tenth an update; the first update has rate 0."""
    step_metrics = new_step_metrics()
    feed(step_metrics, good())
    assert step_metrics.row(1)["optimizer/learning_rate"] == 0.0
    feed(step_metrics, good(), good())
    assert step_metrics.row(3)["optimizer/learning_rate"] == pytest.approx(0.2)
    feed(step_metrics, bad(1, 1))
    assert step_metrics.row(4)["optimizer/learning_rate"] == pytest.approx(0.2)
    feed(step_metrics, good(skipped=1))
    assert step_metrics.row(5)["optimizer/learning_rate"] == pytest.approx(0.3)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when told."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return clock


def test_speed_leaves_out_the_compiling_step_and_pauses(clock):
    step_metrics = new_step_metrics()  # batches of 16 rows

    def step(seconds, tokens=500):
        clock.now += seconds
        feed(step_metrics, good(tokens=tokens))

    step(0)
    step(30)  # the compiling step is over when the second has been sent
    step(2, tokens=400)
    clock.now += 2
    with step_metrics.paused("evaluation"):
        clock.now += 50
    row = step_metrics.row(3)
    assert row["perf/step_time_s"] == 2.0
    assert row["perf/examples_per_second"] == 8.0
    assert row["perf/tokens_per_second"] == (500 + 400) / 4
    assert "perf/mfu" not in row  # a CPU's peak is not known
    step(4)
    clock.now += 4
    assert step_metrics.row(4)["perf/step_time_s"] == 8.0


def test_the_compiling_step_alone_has_no_speed():
    step_metrics = new_step_metrics()
    feed(step_metrics, good())
    assert [name for name in step_metrics.row(1) if name.startswith("perf/")] == ["perf/goodput"]


def test_mfu_is_there_where_the_peak_is_known(clock):
    step_metrics = new_step_metrics()
    device = SimpleNamespace(device_kind="TPU v4")
    step_metrics._mesh = SimpleNamespace(devices=np.array([device, device]))
    feed(step_metrics, good(), good())
    clock.now += 2
    assert step_metrics.row(2)["perf/mfu"] == step_metrics._flops_per_step / (2 * 2 * 275e12)


@pytest.mark.slow
@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_flops_of_a_step_are_those_counted_by_hand(norm_position):
    # 384 words need no padding rows.
    model = tiny_bert(vocab_size=384, norm_position=norm_position)
    config = dataclasses.replace(CONFIG, model=model)
    rows, length, width, inner, chosen = 16, 32, 32, 64, 4  # round(0.15 * 30) are chosen
    per_layer = 4 * 2 * rows * length * width * width  # query, key, value, output
    per_layer += 2 * 2 * rows * length * width * inner
    per_layer += 2 * 2 * rows * length * length * width  # scores, and sums of values
    head = 2 * rows * chosen * width * (width + 384)
    forward = 2 * per_layer + head
    assert phase_flops(config, config.phases[0]) == 3 * forward


def test_each_choice_costs_as_much_as_a_sequence():
    def flops(head, objective, batch_size):
        model = tiny_bert(architecture=f"BertFor{head}", num_labels=1)
        config = tiny_config("", "", model=model, objective=objective, batch_size=batch_size)
        return phase_flops(config, config.phases[0])

    one = flops("SequenceClassification", SequenceClassification(loss="mse"), 12)
    assert flops("MultipleChoice", MultipleChoice(choices=3), 4) == one


def test_flops_of_an_encoder_decoder_are_those_counted_by_hand():
    """Sources of 32 tokens and targets of 10; the decoder has a layer more and half the width."""
    model = T5Config(
        vocab_size=256,
        hidden_size=16,
        num_layers=2,
        num_decoder_layers=3,
        num_heads=2,
        head_dim=4,
        intermediate_size=24,
        decoder_intermediate_size=12,
        gated=True,
    )
    objective = SequenceToSequence(target_length=10)
    config = dataclasses.replace(CONFIG, model=model, objective=objective)
    rows, source, target, width, heads = 16, 32, 10, 16, 2 * 4
    projection = 2 * rows * width * heads  # of one token of each row, in query, key, value, output
    encoder = source * (4 * projection + 3 * 2 * rows * width * 24)
    encoder += 2 * 2 * rows * source * source * heads  # scores, and sums of values
    decoder = target * (6 * projection + 3 * 2 * rows * width * 12)
    decoder += 2 * 2 * rows * target * target * heads // 2  # half of the pairs lie behind
    decoder += source * 2 * projection  # keys and values of the source
    decoder += 2 * 2 * rows * target * source * heads
    logits = 2 * rows * target * width * 256
    forward = 2 * encoder + 3 * decoder + logits
    assert phase_flops(config, config.phases[0]) == 3 * forward
    # The names of modules do not matter.
    params, axes = shapes_and_axes(model)
    names = {"encoder": "reader", "decoder": "aaa", "cross_attention": "b", "words": "table"}

    def renamed(tree):
        return {tuple(names.get(key, key) for key in name): leaf for name, leaf in tree.items()}

    params = unflatten_dict(renamed(flatten_dict(params)))
    sizes = {"batch_size": rows, "sequence_length": source}
    assert step_flops(model, objective, params, renamed(axes), **sizes) == 3 * forward


@pytest.mark.parametrize("objective", [TokenClassification(), QuestionAnswering()])
def test_heads_of_labels_make_no_logits_of_the_tied_table(objective):
    """The table is larger than all layers, and tied."""
    head = type(objective).__name__
    model = tiny_bert(architecture=f"BertFor{head}", num_labels=2, vocab_size=10_000)
    config = dataclasses.replace(CONFIG, model=model, objective=objective)
    rows, length, width = 16, 32, 32
    layers = 2 * (2 * rows * length * (4 * width**2 + 2 * width * 64))
    attention = 2 * 2 * 2 * rows * length * length * width
    forward = layers + attention + 2 * rows * length * width * 2
    assert phase_flops(config, config.phases[0]) == 3 * forward


def test_the_decoder_of_a_classifier_reads_the_source_and_an_encoder_alone_has_none():
    def flops(head, objective):
        model = tiny_architecture(f"T5For{head}", num_labels=2)
        config = dataclasses.replace(CONFIG, model=model, objective=objective)
        params, _ = shapes_and_axes(model)
        return phase_flops(config, config.phases[0]), params, model

    rows, length = 16, 32
    classified, params, model = flops("SequenceClassification", SequenceClassification())
    sizes = {
        "/".join(name): leaf.size for name, leaf in flatten_dict(params).items()
        if name[-1] == "kernel"
    }  # fmt: skip
    stacks = sum(size for name, size in sizes.items() if "/stack/" in name)
    heads = sum(size for name, size in sizes.items() if "/stack/" not in name)
    pairs = rows * length * length * model.attention_width  # of all layers
    # Scores and sums of values: of the encoder, of the decoder to itself (half) and to the source.
    expected = 2 * rows * length * stacks + 4 * pairs * 2.5 + 2 * rows * heads
    assert classified == 3 * expected
    tagged, params, model = flops("TokenClassification", TokenClassification())
    weights = sum(
        leaf.size for name, leaf in flatten_dict(params).items() if name[-1] == "kernel"
    )  # fmt: skip
    assert tagged == 3 * (2 * rows * length * weights + 4 * pairs)


@pytest.mark.parametrize(
    ("frozen", "weights", "attention", "transform", "table"),
    [
        (("words", "embeddings"), 6, 12, 6, 4),  # the tied table passes gradients on
        (("*/kernel",), 4, 12, 4, 6),  # tables, and biases of all layers, are trained
        (("words", "embeddings", "stack"), 2, 4, 6, 4),
    ],
)
def test_frozen_weights_have_no_gradients(frozen, weights, attention, transform, table):
    model = tiny_bert(vocab_size=384)
    config = dataclasses.replace(CONFIG, model=model, optimizer=AdamW(frozen=frozen))
    rows, length, width, inner, chosen = 16, 32, 32, 64, 4
    expected = weights * 2 * rows * length * (4 * width**2 + 2 * width * inner)
    expected += attention * 2 * rows * length * length * width
    expected += rows * chosen * width * (transform * width + table * 384)
    assert phase_flops(config, config.phases[0]) == pytest.approx(expected)


def test_kernels_with_adapters_count_as_trained_and_others_pass_gradients_on():
    model = tiny_bert(vocab_size=384)
    config = dataclasses.replace(CONFIG, model=model, lora=LoraConfig(rank=2))
    rows, length, width, inner, chosen = 16, 32, 32, 64, 4
    expected = 2 * rows * length * (2 * 6 * width**2 + 2 * 4 * width**2 + 4 * 2 * width * inner)
    expected += 12 * 2 * rows * length * length * width
    expected += 4 * rows * chosen * width * (width + 384)
    assert phase_flops(config, config.phases[0]) == pytest.approx(expected)


def test_scores_of_content_and_position_count_like_those_of_content():
    def flops(*terms):
        model = tiny_architecture("DebertaV2ForMaskedLM", position_terms=terms)
        config = dataclasses.replace(CONFIG, model=model)
        return phase_flops(config, config.phases[0]), model

    (none, model), (one, _), (both, _) = flops(), flops("c2p"), flops("c2p", "p2c")
    rows, length = 16, 32
    scores = 2 * rows * length * length * model.hidden_size * model.num_layers
    assert one - none == 3 * scores
    assert both - none == 2 * 3 * scores


@pytest.mark.parametrize("window", [8, 32, None])
def test_only_keys_within_a_window_count(window):
    model = MistralConfig(
        vocab_size=256,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        num_key_value_heads=1,
        intermediate_size=24,
        sliding_window=window,
    )
    config = dataclasses.replace(CONFIG, model=model, objective=CausalLM())
    rows, length = 16, 32
    seen = np.tril(np.ones((length, length))) - np.tril(np.ones((length, length)), -(window or 99))
    pairs = seen.sum() - 0.5 * min(length, window or 99)  # of a pair with itself half counts
    weights = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24) + 16 * 256
    forward = 2 * rows * length * weights + 2 * 2 * 2 * rows * pairs * 16
    assert phase_flops(config, config.phases[0]) == 3 * forward


def test_layers_that_see_all_and_layers_with_a_window_to_each_side_add_up():
    model = ModernBertConfig(
        vocab_size=256,
        hidden_size=16,
        num_layers=4,
        num_heads=2,
        intermediate_size=24,
        local_attention=8,
        global_every=2,
    )
    config = dataclasses.replace(CONFIG, model=model)
    wide = dataclasses.replace(config, model=dataclasses.replace(model, global_every=1))
    length = 32
    distance = np.abs(np.arange(length)[:, None] - np.arange(length)[None, :])
    hidden = 2 * (distance > 4).sum()  # pairs that two of four layers do not look at
    saved = phase_flops(wide, wide.phases[0]) - phase_flops(config, config.phases[0])
    assert saved == 12 * 16 * hidden * 16
