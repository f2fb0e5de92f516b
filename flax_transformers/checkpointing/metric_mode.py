"""Whether lower or higher values of a metric are better, known from its name."""

from __future__ import annotations

import re
from typing import Literal

Mode = Literal["min", "max"]

_HIGHER = (
    r"accuracy|f1|precision|recall|exact_match|bleu|chrf|rouge\w|\w*correlation|matthews|pearson|"
    r"spearman|reward(?!_(rejected|std)($|_))|margin|exact_answer|numeric_answer|matches_pattern|"
    r"tokens_per_second|examples_per_second|mfu|goodput"
)
_LOWER = r"(\w*_)?loss|perplexity|mse|step_time_s"


def mode_of(metric: str) -> Mode | None:
    """ "min" or "max" for a metric such as "eval/loss"; None if its name does not tell.

    The last part of the name decides, and in it what it begins with: "eval/f1_dev/loss" and
    "eval/loss_recall", of a component "recall", are losses. Only whole words count.
    """
    name = metric.rpartition("/")[2]
    if re.match(rf"({_LOWER})($|_)", name):
        return "min"
    if re.search(rf"(^|_)({_HIGHER})($|_)", name):
        return "max"
    return "min" if re.search(rf"_({_LOWER})($|_)", name) else None
