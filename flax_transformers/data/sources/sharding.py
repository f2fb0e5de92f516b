"""Which stretch of a corpus each shard holds, and which shards one process writes in one pass.

The corpus is a row of positions (`records`), and every shard takes an equal share of them: shard
order is corpus order. A border that falls into a solid stretch, which can only be read from its
beginning, moves to one of its ends, unless both are more than half a share away. Then the shards on
both sides are *tied*: whoever writes the later one reads over what is the earlier one's.

All of this follows from the sizes of files and the number of shards alone.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

from flax_transformers.data.sources.records import Records

DEALING = 2
"""Goes up when other documents come into a shard: what is half prepared then begins anew."""
_RUNS = 8
"""Runs per process, so that all of them end at about the same time."""


class Dealing:
    """How the parts of a corpus are dealt to ``shards``."""

    def __init__(self, parts: Sequence[Records], shards: int) -> None:
        self._parts, self.shards = parts, shards
        self.starts = [0, *itertools.accumulate(part.size for part in parts)]
        self._borders: dict[int, tuple[int, bool]] = {}

    def start(self, shard: int) -> int:
        """The first position of a shard; for ``shards`` itself one behind all others."""
        return self._border(shard)[0]

    def tied(self, shard: int) -> bool:
        """Whether a shard begins within a solid stretch."""
        return self._border(shard)[1]

    def _border(self, shard: int) -> tuple[int, bool]:
        if shard in (0, self.shards):
            return (self.starts[-1] + 1 if shard else 0), False
        if shard not in self._borders:
            self._borders[shard] = self._found(shard)
        return self._borders[shard]

    def _found(self, shard: int) -> tuple[int, bool]:
        size = self.starts[-1]
        border = size * shard // self.shards
        part = bisect.bisect_right(self.starts, border) - 1
        if part == len(self._parts):  # nothing has a size
            return border, False
        first = self.starts[part]
        start, stop = (first + end for end in self._parts[part].solid(border - first))
        if not start < border < stop:
            return border, False
        before, after = border - start, stop - border
        if 2 * self.shards * min(before, after) > size:
            return border, True
        return (start if before < after else stop), False


def runs(missing: Sequence[int], tied: Sequence[bool], processes: int) -> list[list[int]]:
    """``missing`` shards, in order, as runs of which each is written in one pass by one process.

    Tied shards stay together as far as the number of processes allows, for each of their runs reads
    what is before it; ``tied`` says of every shard whether it is to the one before.
    """
    most = -(-len(missing) // processes)
    enough = most if processes == 1 else -(-len(missing) // (processes * _RUNS))
    found: list[list[int]] = []
    for shard in missing:
        last = found[-1] if found else []
        together = bool(last) and all(tied[last[-1] + 1 : shard + 1])
        adjacent = bool(last) and last[-1] + 1 == shard
        if (together and len(last) < most) or (adjacent and len(last) < enough):
            last.append(shard)
        else:
            found.append([shard])
    return found


def share(job: int, jobs: int, tied: Sequence[bool]) -> range:
    """The shards that are one job's of several: neighbours, and not tied to another job's if that
    moves no border by more than half a share."""
    shards = len(tied)

    def border(number: int) -> int:
        ideal = shards * number // jobs
        if number in (0, jobs):
            return ideal
        reach = shards // (2 * jobs)
        near = sorted(range(ideal - reach, ideal + reach + 1), key=lambda i: (abs(i - ideal), i))
        return next((i for i in near if 0 < i < shards and not tied[i]), ideal)

    return range(border(job), border(job + 1))
