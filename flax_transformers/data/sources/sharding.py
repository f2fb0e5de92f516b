"""Divides a corpus into shards, and shards into runs that one process writes in one pass.

A corpus is a range of positions (`records`), and every shard is an equal part of it, in order. If a
border is inside a solid stretch, which can only be read from its beginning, it is moved to one of
its ends, unless both are more than half a shard away. In that case the shards on both sides are
*tied*: writing the later one requires reading over the earlier one.

The result depends on the sizes of files and the number of shards only.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

from flax_transformers.data.sources.records import Records

VERSION = 2
"""Increased when the documents of a shard change; unfinished stores are then prepared again."""
_RUNS = 8
"""Runs per process, so that all processes end at about the same time."""


class Sharding:
    """How the parts of a corpus are divided into ``shards``."""

    def __init__(self, parts: Sequence[Records], shards: int) -> None:
        self._parts, self.shards = parts, shards
        self.starts = [0, *itertools.accumulate(part.size for part in parts)]
        self._borders: dict[int, tuple[int, bool]] = {}

    def start(self, shard: int) -> int:
        """The first position of a shard; for ``shards`` itself, the end."""
        return self._border(shard)[0]

    def tied(self, shard: int) -> bool:
        """Whether a shard begins inside a solid stretch."""
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
    """The ``missing`` shards, in order, as runs that are each written in one pass by one process.

    ``tied``: for each shard, whether it is tied to the one before. Tied shards stay in one run as
    far as the number of processes allows, because each run reads what is before it.
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
    """The shards of one of several jobs: neighbours, and not tied to those of another job if this
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
