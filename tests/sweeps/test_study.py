"""Grids and studies: which runs they consist of, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from etils import epath

from flax_transformers.cli.parsing import override
from flax_transformers.errors import UserError
from flax_transformers.sweeps.study import Study, StudyRuns, baseline_of, grid_axes, points
from flax_transformers.testing import tiny_config

BASE = tiny_config("text.txt", "store")
GRID = grid_axes(["optimizer.learning_rate=2e-5,3e-5", "phases.0.steps=10,20"])


def names(study, axes):
    return [point.name for point in points(study, axes, override)]


def refused(study, *grid):
    with pytest.raises(UserError) as caught:
        points(study, grid_axes(grid), override)
    return str(caught.value)


def test_a_grid_has_every_combination_of_its_values():
    found = points(Study(base=BASE), GRID, override)
    assert [point.name for point in found] == [
        "learning_rate=2e-5,steps=10",
        "learning_rate=2e-5,steps=20",
        "learning_rate=3e-5,steps=10",
        "learning_rate=3e-5,steps=20",
    ]
    last = found[3]
    assert (last.config.optimizer.learning_rate, last.config.phases[0].steps) == (3e-5, 20)
    assert last.config.model == BASE.model
    assert last.settings == {"optimizer.learning_rate": "3e-5", "phases.0.steps": "20"}


def test_fields_with_the_same_last_name_keep_their_whole_name():
    axes = grid_axes(["model.dropout=0.1", "model.num_layers=1", "phases.0.steps=9",
                      "checkpoints.every_steps=5", "evaluation.every_steps=5"])  # fmt: skip
    assert names(Study(base=BASE), axes) == [
        "dropout=0.1,num_layers=1,steps=9,checkpoints.every_steps=5,evaluation.every_steps=5"
    ]


def test_a_name_is_a_plain_folder_name_and_different_values_have_different_ones():
    axes = grid_axes(["data.source.path=/a/b.txt,/a:b.txt,-a-b.txt"])
    found = names(Study(base=BASE), axes)
    assert found[0].startswith("path=-a-b.txt-") and found[2] == "path=-a-b.txt"
    assert len(set(found)) == 3 and not set("/:") & set("".join(found))
    long = names(Study(base=BASE), grid_axes([f"data.source.path={'x' * 300}"]))
    assert len(long[0]) < 60


def test_blanks_in_a_value_separate_the_items_of_a_tuple():
    (point,) = points(Study(base=BASE), grid_axes(["optimizer.frozen=words embeddings"]), override)
    assert point.config.optimizer.frozen == ("words", "embeddings")


def test_an_unknown_field_names_the_nearest_and_the_point():
    assert refused(Study(base=BASE), "optimizer.lerning_rate=1") == (
        "grid point lerning_rate=1: there is no option --optimizer.lerning-rate; did you mean "
        "--optimizer.learning-rate?"
    )


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (["optimizer.learning_rate=abc"], "is 'abc'; it must be a number"),
        (["model.num_heads=4,3"], "grid point num_heads=3: "),
        (["phases.0.steps=0"], "phases.steps is 0; it must be at least 1"),
        (["phases.0.steps"], "--grid phases.0.steps is not a field and its values"),
        (["phases.0.steps=1,,2"], "is not a field and its values"),
        (["seed=1,2"], "give the number of seeds with --seeds"),
        (["phases.0.steps=1,1"], "repeats a field or a value"),
        (["phases.0.steps=1", "phases.0.steps=2"], "repeats a field or a value"),
        (["phases.0.steps=10,010"], "the grid points steps=10 and steps=010 have the same config"),
    ],
)
def test_bad_grids_are_refused_in_one_sentence(grid, says):
    assert says in refused(Study(base=BASE), *grid)


def test_variants_are_fields_or_functions_of_the_base():
    study = Study(
        base=BASE,
        variants={
            "relu": {"model.activation": "relu", "optimizer.frozen": ("words",)},
            "wide": lambda base: replace(base, model=replace(base.model, intermediate_size=128)),
        },
    )
    relu, wide = points(study, {}, override)
    assert (relu.config.model.activation, relu.config.optimizer.frozen) == ("relu", ("words",))
    assert (wide.config.model.intermediate_size, wide.config.model.activation) == (128, "gelu")
    assert names(study, {"phases.0.steps": ("5",)}) == ["relu,steps=5", "wide,steps=5"]


def test_each_point_runs_with_each_seed_the_first_seed_first():
    study = Study(base=replace(BASE, seed=7), seeds=2, variants={"a": {}})
    found = points(study, GRID, override)
    sweep = StudyRuns(study, tuple(found[:2]), found[0], epath.Path("/runs"))
    assert [(run.name, run.seed) for run in sweep.runs] == [
        ("a,learning_rate=2e-5,steps=10,seed=7", 7),
        ("a,learning_rate=2e-5,steps=20,seed=7", 7),
        ("a,learning_rate=2e-5,steps=10,seed=8", 8),
        ("a,learning_rate=2e-5,steps=20,seed=8", 8),
    ]
    (training,) = sweep.runs[3].trainings
    assert training.config == replace(found[1].config, seed=8)
    assert training.workdir == epath.Path("/runs/a,learning_rate=2e-5,steps=20,seed=8")


def test_fine_tuning_is_a_second_training_from_the_weights_of_the_first():
    study = Study(base=BASE, seeds=2, fine_tune=lambda config, workdir: replace(
        config, data=replace(config.data, store=f"{workdir}/store")))  # fmt: skip
    found = points(study, {}, override)
    first, second = StudyRuns(study, tuple(found), found[0], epath.Path("/runs")).runs[1].trainings
    assert first.config.init_from is None
    assert second.config.init_from == str(first.workdir) == "/runs/seed=1"
    assert second.workdir == epath.Path("/runs/seed=1,fine_tuned")
    assert (second.config.seed, second.config.data.store) == (1, "/runs/seed=1/store")


def test_fine_tuning_can_choose_the_weights_it_starts_from():
    base = replace(BASE, init_from="hub/model")
    for chosen in ("checkpoints/best", "checkpoints/5"):
        study = Study(base=base, fine_tune=lambda config, workdir, chosen=chosen: replace(
            config, init_from=f"{workdir}/{chosen}"))  # fmt: skip
        found = points(study, {}, override)
        (run,) = StudyRuns(study, tuple(found), found[0], epath.Path("/runs")).runs
        starts = [training.config.init_from for training in run.trainings]
        assert starts == ["hub/model", f"/runs/seed=0/{chosen}"]


@pytest.mark.parametrize("returned", [None, "hub/model"])
def test_fine_tuning_that_names_no_other_weights_continues_from_the_first_training(returned):
    def another_recipe(config, workdir):
        return replace(config, init_from=returned)

    study = Study(base=replace(BASE, init_from="hub/model"), fine_tune=another_recipe)
    found = points(study, {}, override)
    (run,) = StudyRuns(study, tuple(found), found[0], epath.Path("/runs")).runs
    assert run.trainings[1].config.init_from == "/runs/seed=0"


def test_fine_tuning_can_differ_between_variants():
    def fine_tune(steps):
        return lambda config, workdir: replace(
            config, phases=(replace(config.phases[0], steps=steps),)
        )

    study = Study(
        base=BASE,
        variants={"once": {"model.dropout": 0.5}, "short": {}, "long": {}},
        fine_tune={"short": fine_tune(3), "long": fine_tune(4)},
    )
    found = points(study, {}, override)
    once, short, long = StudyRuns(study, tuple(found), found[0], epath.Path("/runs")).runs
    assert len(once.trainings) == 1
    assert [run.trainings[1].config.phases[0].steps for run in (short, long)] == [3, 4]
    with pytest.raises(UserError, match="no variant 'other'"):
        replace(study, fine_tune={"other": fine_tune(5)})
    with pytest.raises(UserError, match="the grid points short and long have the same config"):
        points(replace(study, fine_tune=fine_tune(3)), {}, override)


def test_options_that_say_how_a_run_is_carried_out_are_set_in_the_configs_of_functions():
    def own_settings(config, workdir=""):
        evaluation = replace(config.evaluation, every_steps=7, batch_size=250)
        return replace(BASE, evaluation=evaluation, max_consecutive_skips=4)

    given = ("--evaluation.batch-size", "8", "--checkpoints.keep-latest=1", "--platform", "cpu",
             "--logging.ledger=True", "--mesh.fsdp=-1", "--mesh.data=1",
             "--evaluation.every-steps=9", "--max-consecutive-skips=5")  # fmt: skip
    base = override(BASE, given)
    study = Study(base=base, variants={"a": {}, "b": own_settings}, fine_tune={"a": own_settings})
    found = points(study, {}, override, given)
    a, b = StudyRuns(study, tuple(found), found[0], epath.Path("/runs"), given).runs
    for config in (a.trainings[1].config, b.trainings[0].config):
        assert config.evaluation == replace(base.evaluation, every_steps=7)
        assert (config.checkpoints, config.logging) == (base.checkpoints, base.logging)
        assert (config.mesh, config.platform, config.max_consecutive_skips) == (base.mesh, "cpu", 4)


def test_the_baseline_is_the_first_point_of_its_variant_or_the_one_that_is_named():
    study = Study(base=BASE, variants={"a": {}, "b": {"model.dropout": 0.5}}, baseline="b")
    found = points(study, {"phases.0.steps": ("5", "6")}, override)
    assert baseline_of(study, found, None).name == "b,steps=5"
    assert baseline_of(study, found, "a,steps=6").name == "a,steps=6"
    with pytest.raises(UserError, match="no grid point a; --baseline is one of a,steps=5, a,steps"):
        baseline_of(study, found, "a")


@pytest.mark.parametrize(
    ("metric", "higher"),
    [
        ("eval/loss", False),
        ("eval/loss_de", False),
        ("eval/masked_lm_loss", False),
        ("eval/accuracy", True),
        ("eval/next_sentence_accuracy", True),
        ("eval/entity_f1", True),
        ("eval/bleu_de", True),
        ("eval/rougeL", True),
        ("perf/step_time_s", False),
        ("perf/tokens_per_second", True),
    ],
)
def test_the_direction_of_a_metric_is_known_from_its_name(metric, higher):
    assert Study(base=BASE, metric=metric).higher_is_better is higher
    assert Study(base=BASE, metric=metric, maximize=not higher).higher_is_better is not higher


def test_studies_that_cannot_be_run_are_refused():
    with pytest.raises(UserError, match="add --maximize or --minimize"):
        Study(base=BASE, metric="eval/my_score").higher_is_better  # noqa: B018
    with pytest.raises(UserError, match="no variant 'c'; its variants are a, b"):
        Study(base=BASE, variants={"a": {}, "b": {}}, expected=(("a", "c"),))
    with pytest.raises(UserError, match="is called 'a/b'; folders have its name"):
        Study(base=BASE, variants={"a/b": {}})
    with pytest.raises(UserError, match="variants of the study is empty"):
        Study(base=BASE, variants={})
    with pytest.raises(UserError, match="seeds of the study is 0"):
        Study(base=BASE, seeds=0)


def test_functions_of_a_study_that_fail_are_refused_in_one_sentence():
    def refused(variant):
        with pytest.raises(UserError) as caught:
            points(Study(base=BASE, variants={"a": variant}), {}, override)
        return str(caught.value)

    assert refused(lambda base: base.modle).startswith(
        "grid point a: a variant of the study fails with AttributeError: 'TrainConfig' object"
    )
    assert refused(lambda base: None).endswith("must return a TrainConfig, not <class 'NoneType'>")
