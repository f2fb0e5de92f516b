"""Rewards: verifiers, functions of the user's, and what goes wrong in them."""

import sys
import time

import numpy as np
import pytest

from flax_transformers.config_json import from_json, to_json
from flax_transformers.errors import UserError
from flax_transformers.post_training.reinforcement.policy import GroupRelativePolicy, Rollouts
from flax_transformers.post_training.reinforcement.ppo import ProximalPolicy
from flax_transformers.post_training.reinforcement.rewards import (
    ExactAnswer,
    FunctionReward,
    MatchesPattern,
    NumericAnswer,
    checked_scores,
    reward_names,
)

ROWS = [{"prompt": "2+2=", "answer": "4"}, {"prompt": "1000+234=", "answer": "1,234"}]
PROMPTS = [row["prompt"] for row in ROWS]


def length(prompts, completions, rows):
    return [len(text) for text in completions]


def score(reward, completions, rows=ROWS):
    return checked_scores(reward, reward.scorer(None), PROMPTS, completions, rows)


def test_verifiers():
    assert score(ExactAnswer(), [" 4\n", "1234"]) == [1, 0]
    assert score(NumericAnswer(), ["it is 4.0", "= 1234"]) == [1, 1]
    assert score(NumericAnswer(), ["4 or 5", "none"]) == [0, 0]
    assert score(NumericAnswer(tolerance=0.1), ["4.3", "-1234"]) == [1, 0]
    assert score(MatchesPattern(pattern=r"<a>.*</a>"), ["<a>4\n5</a>", "x<a></a>"]) == [1, 0]


def test_a_sign_behind_a_digit_is_no_sign_and_the_tolerance_is_relative():
    rows = [{"prompt": "8-5=", "answer": "5"}, {"prompt": "", "answer": "0.01"}]
    assert score(NumericAnswer(), ["8-5", "(-0.01)"], rows) == [1, 0]
    assert score(NumericAnswer(tolerance=0.05), ["-5", "0.05"], rows) == [0, 0]
    assert score(NumericAnswer(tolerance=0.05), ["5.2", "0.0104"], rows) == [1, 1]


def test_a_pattern_that_takes_for_ever_is_given_up():
    reward = MatchesPattern(pattern="(a+)+b", time_limit_s=0.5)
    start = time.monotonic()
    with pytest.raises(UserError, match="matches_pattern did not return within 0.5 s"):
        score(reward, ["a" * 40, ""])
    assert time.monotonic() - start < 20


def test_a_function_is_known_by_its_name_and_survives_a_saved_config():
    reward = FunctionReward(function=length, weight=0.5)
    assert reward.function.endswith("test_rewards:length") and reward.name == "length"
    again = from_json(to_json(reward))
    assert again == reward
    assert score(again, ["ab", ""]) == [2, 0]


def test_a_function_named_by_module_is_found_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_rewards.py").write_text("def score(p, c, r):\n    return [0.5] * len(c)\n")
    monkeypatch.chdir(tmp_path)
    assert score(FunctionReward(function="my_own_rewards:score"), ["", ""]) == [0.5, 0.5]
    monkeypatch.delitem(sys.modules, "my_own_rewards")


@pytest.mark.parametrize("name", ["os:system", "subprocess:run", "json:dumps"])
def test_a_name_means_no_function_of_an_imported_module(name):
    with pytest.raises(UserError, match=f"there is no reward function {name}: no config file"):
        FunctionReward(function=name).scorer(None)


def test_a_name_imports_nothing_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "antigravity" not in sys.modules
    with pytest.raises(UserError, match="there is no reward function antigravity:fly"):
        FunctionReward(function="antigravity:fly").scorer(None)
    assert "antigravity" not in sys.modules


def test_a_function_without_a_name_is_refused():
    with pytest.raises(UserError, match="define it at the top of a module"):
        FunctionReward(function=lambda prompts, completions, rows: [])
    with pytest.raises(UserError, match="a reward function is 3"):
        FunctionReward(function=3)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "returned 1 numbers for 2 completions"),
        (None, "returned None; it must return one number"),
        ([1.0, float("nan")], "gives nan to the completion 'b'"),
        ([1.0, None], "gives None to the completion 'b'"),
        (np.array([1.0, np.inf]), "gives .*inf.* to the completion 'b'"),
    ],
)
def test_a_wrong_result_is_reported(result, message):
    with pytest.raises(UserError, match=message):
        checked_scores(ExactAnswer(), lambda *_: result, PROMPTS, ["a", "b"], ROWS)


def test_an_exception_is_reported_with_its_message():
    def fail(*_):
        raise ZeroDivisionError("no luck")

    message = "exact_answer fails with ZeroDivisionError: no luck"
    with pytest.raises(UserError, match=message) as caught:
        checked_scores(ExactAnswer(), fail, PROMPTS, ["a", "b"], ROWS)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_reward_that_hangs_is_given_up():
    began = time.monotonic()
    with pytest.raises(UserError, match=r"did not return within 0.1 s"):
        checked_scores(
            ExactAnswer(time_limit_s=0.1), lambda *_: time.sleep(5), PROMPTS, ["a"], ROWS
        )
    assert time.monotonic() - began < 3


def test_a_timeout_inside_a_reward_is_its_own_failure():
    def fail(*_):
        raise TimeoutError("of the user's server")

    with pytest.raises(UserError, match="fails with TimeoutError: of the user's server"):
        checked_scores(ExactAnswer(), fail, PROMPTS, ["a", "b"], ROWS)


def kl(prompts, completions, rows):
    return [0.0 for _ in completions]


def truncated(prompts, completions, rows):
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("objective", "function"),
    [(GroupRelativePolicy, truncated), (ProximalPolicy, truncated), (ProximalPolicy, kl)],
)
def test_a_reward_with_the_name_of_a_statistic_is_refused(objective, function):
    rollouts = Rollouts(rewards=(ExactAnswer(), FunctionReward(function=function)))
    with pytest.raises(UserError, match=f"metric would be rollout/{function.__name__}, .* another"):
        objective(rollouts=rollouts)


def test_a_reward_may_have_the_name_of_what_its_objective_does_not_log():
    objective = GroupRelativePolicy(rollouts=Rollouts(rewards=(FunctionReward(function=kl),)))
    assert objective.statistics[-1] == "rollout/kl"


def test_rewards_of_one_kind_are_numbered():
    rewards = [ExactAnswer(), MatchesPattern(pattern="a"), MatchesPattern(pattern="b")]
    assert reward_names(rewards) == ["exact_answer", "matches_pattern_1", "matches_pattern_2"]
