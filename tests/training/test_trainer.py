"""The trainer from Python: own loops, fit, evaluation, callbacks and sinks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import flax_transformers as ft
from flax_transformers.errors import UserError
from flax_transformers.huggingface.family import build_model
from flax_transformers.models.config import ComputeConfig
from flax_transformers.objectives.base import Vocabulary
from flax_transformers.objectives.masked_lm import MaskedLM
from flax_transformers.optim.ema import EMAConfig
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.parallel.partitioning import gradient_dtype
from flax_transformers.testing import assert_bit_equal, tiny_bert

VOCABULARY = Vocabulary(
    262, pad_id=0, cls_id=1, sep_id=2, mask_id=3, special_ids=(0, 1, 2, 3),
    word_start=np.ones(262, bool),
)  # fmt: skip
LENGTH, ROWS = 16, 8


def batches(count, rows=ROWS):
    rng = np.random.default_rng(0)
    for _ in range(count):
        examples = [
            {
                "tokens": rng.integers(4, 262, LENGTH - 2).astype(np.int32),
                "document_ends": np.array([LENGTH - 2], np.int32),
                "sentence_ends": np.array([LENGTH - 2], np.int32),
            }
            for _ in range(rows)
        ]
        made = [MaskedLM().prepare(one, rng, VOCABULARY, LENGTH) for one in examples]
        yield {name: np.stack([row[name] for row in made]) for name in made[0]}


def trainer(mesh=None, optimizer=None, **settings):
    mesh = mesh or ft.make_mesh(devices=jax.devices()[:1])
    optimizer = optimizer or optax.adamw(1e-2)
    return ft.Trainer(
        model=tiny_bert(), objective=MaskedLM(), optimizer=optimizer, mesh=mesh, **settings
    )


@pytest.fixture(scope="module")
def plain():
    return trainer()


class Recorder(ft.Callback):
    def __init__(self):
        self.events = []

    def on_train_begin(self, step, total_steps):
        self.events.append(("begin", step, total_steps))

    def on_step(self, step, state):
        self.events.append(("step", step))

    def on_metrics(self, step, metrics):
        self.events.append(("metrics", step, metrics["train/loss"]))

    def on_train_end(self, step):
        self.events.append(("end", step))


class Rows(ft.MetricSink):
    def __init__(self):
        self.rows, self.closed = {}, False

    def write(self, step, metrics):
        self.rows[step] = metrics

    def close(self):
        self.closed = True


@pytest.mark.slow
def test_a_loop_of_ones_own_takes_the_steps_of_fit(plain):
    state = plain.init(seed=3)
    losses = []
    for batch in batches(4):
        state, metrics = plain.step(state, batch)
        losses.append(float(metrics["train/loss"]))
    recorder, sink = Recorder(), Rows()
    fitted = plain.fit(
        plain.init(seed=3), batches(9), steps=4, callbacks=[recorder], sinks=[sink], log_every=1
    )
    assert_bit_equal(fitted, state)
    assert [float(np.float32(loss)) for _, _, loss in recorder.events[2::2][:4]] == losses
    assert recorder.events[0] == ("begin", 0, 4) and recorder.events[-1] == ("end", 4)
    assert [event[1] for event in recorder.events if event[0] == "step"] == [1, 2, 3, 4]
    assert list(sink.rows) == [1, 2, 3, 4] and sink.closed
    assert "perf/step_time_s" in sink.rows[4] and "perf/mfu" not in sink.rows[4]


@pytest.mark.slow
@pytest.mark.full  # tests/multi_device/test_rollouts.py has a trainer on a mesh
def test_a_mesh_of_four_devices_trains_as_one_does(plain):
    divided = trainer(ft.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4]))
    state, one = divided.init(seed=1), plain.init(seed=1)
    assert len(state.params["stack"]["layers"]["block_0"]["mlp"]["up"]["kernel"].devices()) == 4
    for batch in batches(3):
        state, metrics = divided.step(state, batch)
        one, expected = plain.step(one, batch)
        assert float(metrics["train/loss"]) == pytest.approx(float(expected["train/loss"]), 1e-5)


@pytest.mark.slow
def test_given_parameters_are_copied_and_not_donated(plain):
    params = plain.init(seed=5).params
    kept = jax.tree.map(np.asarray, params)
    state = plain.init(params=params)
    for batch in batches(1):
        plain.step(state, batch)
    assert_bit_equal(params, kept)


@pytest.mark.slow
@pytest.mark.parametrize(
    "ema", [EMAConfig(decay=0.9), pytest.param(EMAConfig(), marks=pytest.mark.full)]
)
def test_an_optimizer_that_keeps_parameters_keeps_the_given_ones(plain, ema):
    keeping = trainer(optimizer=optax.contrib.schedule_free_sgd(1e-2), ema=ema)
    params = plain.init(seed=5).params
    state = keeping.init(params=params)
    assert_bit_equal(state.opt_state.z, params)
    assert_bit_equal(state.params, params)
    assert_bit_equal(state.evaluation_params, params)
    for batch in batches(1):
        state, metrics = keeping.step(state, batch)  # which donates each of them once
    assert np.isfinite(metrics["train/loss"])


def test_parameters_of_another_model_are_refused_by_name(plain):
    params = dict(plain.abstract.params)
    del params["stack"]
    with pytest.raises(UserError, match=r"params has stack/.* of shape none, but the model has"):
        plain._copied(params)


@pytest.mark.slow
def test_evaluation_counts_every_example_once(plain):
    state = plain.init()
    whole = {
        name: np.concatenate([batch[name] for batch in batches(2)]) for name in next(batches(1))
    }

    def parts(rows):
        for start in range(0, 2 * ROWS, rows):
            yield {name: array[start : start + rows] for name, array in whole.items()}

    found = plain.evaluate(state, parts(6))
    assert set(found) == {"eval/loss", "eval/accuracy"}
    assert found["eval/loss"] == pytest.approx(plain.evaluate(state, parts(8))["eval/loss"], 1e-6)


@pytest.mark.slow
def test_evaluation_needs_no_batch_that_micro_batches_divide():
    divided = trainer(micro_batches=8)
    [batch] = batches(1, rows=4)
    assert np.isfinite(divided.evaluate(divided.init(), [batch])["eval/loss"])


def test_a_mesh_without_the_axes_of_the_sharding_rules_is_refused():
    with pytest.raises(UserError, match=r"lacks one of the axes data, fsdp, .*; use ft\.make_mesh"):
        trainer(mesh=jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",)))


def test_fit_refuses_rows_of_metrics_of_no_step(plain):
    with pytest.raises(UserError, match="log_every is 0"):
        plain.fit(plain.init(), batches(1), steps=1, log_every=0)


def test_a_batch_that_does_not_divide_over_the_mesh_is_one_sentence():
    divided = trainer(ft.make_mesh(data=4, devices=jax.devices()[:4]))
    with pytest.raises(UserError, match="batch_size 6 does not divide over mesh data=4"):
        divided.place({"input_ids": np.zeros((6, 4), np.int32)})


def test_a_config_of_an_optimizer_needs_the_number_of_steps():
    with pytest.raises(UserError, match="give Trainer the total_steps"):
        trainer(optimizer=AdamW())
    assert float(trainer(optimizer=AdamW(), total_steps=10).learning_rate(0)) == np.float32(1e-4)


@pytest.mark.slow
def test_an_exception_in_a_callback_reaches_the_caller_after_everybody_was_told(plain):
    class Broken(ft.Callback):
        def on_step(self, step, state):
            if step == 2:
                raise ZeroDivisionError("mine")

        def on_train_end(self, step):
            raise KeyError("must not hide it")

    recorder, sink = Recorder(), Rows()
    with pytest.raises(ZeroDivisionError, match="mine"):
        plain.fit(plain.init(), batches(5), steps=5, callbacks=[Broken(), recorder], sinks=[sink])
    assert recorder.events[-1] == ("end", 2)
    assert sink.closed


@pytest.mark.slow
def test_batches_that_end_early_are_no_error(plain, caplog):
    state = plain.fit(plain.init(), batches(2), steps=5, sinks=[])
    assert int(state.step) == 2
    assert "the batches ended after step 2 of 5" in caplog.text


@pytest.mark.slow
def test_the_speed_counts_the_examples_of_batches_of_different_sizes(plain, caplog):
    sink, sizes = Rows(), (ROWS, ROWS, 3 * ROWS)
    mixed = [batch for rows in sizes for batch in batches(1, rows)]
    state = plain.fit(plain.init(), mixed, steps=3, sinks=[sink])
    speed = sink.rows[3]["perf/examples_per_second"] * sink.rows[3]["perf/step_time_s"]
    assert speed == pytest.approx((ROWS + 3 * ROWS) / 2)  # without the first step, which compiles
    assert plain.fit(state, [], steps=1, sinks=[sink]) is state
    assert list(sink.rows) == [3] and "the batches ended after step 3 of 4" in caplog.text


@pytest.mark.slow
def test_a_callback_can_stop_training_and_padding_is_not_counted_as_tokens(plain, caplog):
    class Impatient(ft.Callback):
        def on_metrics(self, step, metrics):
            if step == 2:
                self.stop("seen enough")

    padded = list(batches(5))
    for batch in padded:
        batch["attention_mask"][:, -3:] = 0
    sink, impatient = Rows(), Impatient()
    with caplog.at_level("WARNING"):
        state = plain.fit(
            plain.init(), padded, steps=5, callbacks=[impatient], sinks=[sink], log_every=1
        )
    assert int(state.step) == 2 and list(sink.rows) == [1, 2]
    assert "a callback stops at step 2: seen enough" in caplog.text
    tokens = sink.rows[2]["perf/tokens_per_second"] * sink.rows[2]["perf/step_time_s"]
    assert tokens == pytest.approx(ROWS * (LENGTH - 3))
    assert int(plain.fit(state, padded, steps=1, callbacks=[impatient], sinks=[]).step) == 3


@pytest.mark.slow
def test_a_model_that_was_built_keeps_float32_parameters():
    model = build_model(tiny_bert(), ComputeConfig())
    built = ft.Trainer(
        model=model, objective=MaskedLM(), optimizer=optax.sgd(0.1), mesh=ft.make_mesh(fsdp=2)
    )
    assert jax.tree.all(jax.tree.map(lambda leaf: leaf.dtype == jnp.float32, built.abstract.params))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_reduced_in_the_dtype_of_the_compute_of_the_model(dtype):
    seen = []

    class Asks(MaskedLM):
        def terms(self, *arguments):
            seen.append(str(gradient_dtype(jnp.dtype("bfloat16"))))
            return super().terms(*arguments)

    model = build_model(tiny_bert(), ComputeConfig("bfloat16", gradient_reduce_dtype=dtype))
    built = ft.Trainer(model=model, objective=Asks(), optimizer=optax.sgd(0.1))
    with jax.set_mesh(built.mesh):
        built.train_step().trace(built.abstract, built.place(next(batches(1))))
    assert seen == [dtype]
