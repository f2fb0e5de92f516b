"""Texts that end generation, found on the device token by token.

For each stop string, a table says how far a text has come through it after each token of the
vocabulary: the automaton of Knuth, Morris and Pratt (1977), run over all tokens at once. N stop
strings, Q characters of the longest one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_transformers.errors import UserError

_FOUND = -1


class StopStrings(NamedTuple):
    """Tables of stop strings, and the progress at the end of each prompt.

    ``after_NVQ`` int32: the number of matched characters after a token that follows q matched ones;
    -1 if the token completes the stop string. ``start`` int32 [B, N].
    """

    after_NVQ: jax.Array
    start: jax.Array

    @classmethod
    def of(
        cls, texts: Sequence[str], pieces: Sequence[str], prompts: Sequence[Sequence[int]]
    ) -> StopStrings:
        """For the ``texts``, given what each token adds to a text (``pieces``) and the ids of each
        prompt. A stop string can begin in the prompt, but not end in it.

        Raises UserError for an empty stop string.
        """
        if not all(texts):
            raise UserError("a stop string is empty; give at least one character")
        longest = max(map(len, texts))
        characters = {c: i for i, c in enumerate(sorted(set("".join(texts))), start=1)}
        pieces_VP = _coded(pieces, characters)
        tables: list[np.ndarray] = []
        starts: list[list[int]] = []
        for text in texts:
            moves, border = _moves([characters[c] for c in text], len(characters) + 1)
            after_VQ = np.tile(np.arange(len(text), dtype=np.int32), (len(pieces), 1))
            found_VQ = np.zeros(after_VQ.shape, bool)
            for codes_V in pieces_VP.T:
                stepped_VQ = moves[after_VQ, np.maximum(codes_V, 0)[:, None]]
                found_VQ |= (stepped_VQ == len(text)) & (codes_V >= 0)[:, None]
                after_VQ = np.where((codes_V >= 0)[:, None], stepped_VQ, after_VQ)
            starts.append([])
            for prompt in prompts:
                matched = 0
                for character in "".join(pieces[i] for i in prompt):
                    matched = int(moves[matched, characters.get(character, 0)])
                starts[-1].append(border if matched == len(text) else matched)
            after_VQ = np.where(found_VQ, _FOUND, after_VQ)
            tables.append(np.pad(after_VQ, ((0, 0), (0, longest - len(text)))))
        return cls(jnp.asarray(np.stack(tables)), jnp.asarray(np.array(starts, np.int32).T))

    def advance(self, progress: jax.Array, ids: jax.Array) -> jax.Array:
        """Progress int32 [..., N] after the tokens ``ids`` int32 [...]; -1 where one was found."""
        flat_RN = progress.reshape(-1, progress.shape[-1])
        number_1N = jnp.arange(progress.shape[-1])[None, :]
        after_RN = self.after_NVQ[number_1N, ids.reshape(-1, 1), jnp.maximum(flat_RN, 0)]
        return jnp.where(flat_RN < 0, _FOUND, after_RN).reshape(progress.shape)


def _coded(pieces: Sequence[str], characters: dict[str, int]) -> np.ndarray:
    """Pieces as codes of characters int32 [V, P]; 0 for those in no stop string, -1 after the
    last."""
    coded = np.full((len(pieces), max(map(len, pieces), default=0)), -1, np.int32)
    for row, piece in enumerate(pieces):
        coded[row, : len(piece)] = [characters.get(c, 0) for c in piece]
    return coded


def _moves(text: Sequence[int], codes: int) -> tuple[np.ndarray, int]:
    """Number of matched characters after each code, by the number before, int32 [Q + 1, codes];
    and the length of the longest beginning of the text that is also its end, but not all of it."""
    moves = np.zeros((len(text) + 1, codes), np.int32)
    border = 0  # of what is matched
    for matched, code in enumerate(text):
        moves[matched] = moves[border]
        if matched:
            border = int(moves[border, code])
        moves[matched, code] = matched + 1
    moves[-1] = moves[border]
    return moves, border
