"""Keys and values of beginnings of prompts, kept outside of any row, so that they are not computed again.

They are kept in blocks of ``grain`` tokens. A block is found by a hash of its own tokens and of all before
them. Only tokens that were read as a prompt are kept, so that reading them again would give the same states.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.decoding.pieces import Pieces
from qrun.decoding.slots import Slots


@dataclass(frozen=True)
class Block:
    """Keys and values of some tokens.

    Attributes:
        states: ``[kv_heads, grain, head_size]`` of each buffer of the cache.
    """

    states: list[NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self.states)


class PrefixCache:
    """Blocks of prompts; the least recently used ones are dropped first.

    Attributes:
        hits: tokens of prompts that were found here.
        misses: tokens of prompts, in whole blocks, that were not found.

    Args:
        most_bytes: of keys and values.
        grain: tokens of a block.
    """

    def __init__(self, most_bytes: int, grain: int) -> None:
        self.grain = grain
        self.hits = self.misses = 0
        self.nbytes = 0
        self._most_bytes = most_bytes
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def blocks(self) -> Iterator[tuple[bytes, list[NDArray[Any]]]]:
        """Names and states of all blocks, the least recently used first."""
        return ((name, block.states) for name, block in self._blocks.items())

    def put(self, name: bytes, states: list[NDArray[Any]]) -> None:
        """Take up a block that ``blocks`` once gave; others are dropped where there is no room for all."""
        self._add(name, Block(states))
        self._drop()

    def clear(self) -> None:
        """Forget all blocks."""
        self._blocks.clear()
        self.nbytes = 0

    def restore(self, slots: Slots, row: int, prompt_ids: Sequence[int], pieces: Pieces) -> int:
        """Copy the kept blocks with which a prompt begins into a row, which may hold some of them already.

        Args:
            slots: the rows.
            row: which of them.
            prompt_ids: the whole prompt.
            pieces: what is reused ends at one of their cuts.

        Returns:
            Tokens of the prompt that the row holds now; at least one is left to be fed.

        Raises:
            QrunError: more memory than the machine has left.
        """
        names = list(self._names(prompt_ids[:-1]))
        known = list(takewhile(self._blocks.__contains__, names))
        known = known[: pieces.whole(len(known) * self.grain, len(prompt_ids)) // self.grain]
        held = len(slots.token_ids[row]) // self.grain
        for index, name in enumerate(known):
            self._blocks.move_to_end(name)
            if index >= held:
                tokens = prompt_ids[index * self.grain : (index + 1) * self.grain]
                slots.copy_in(row, tokens, self._blocks[name].states)
        found = max(held, len(known))
        self.hits += found * self.grain
        self.misses += (len(names) - found) * self.grain
        return len(slots.token_ids[row])

    def keep(self, slots: Slots, row: int) -> None:
        """Keep the whole blocks that a row has read as a prompt."""
        for index, name in enumerate(self._names(slots.token_ids[row][: slots.read[row]])):
            if name not in self._blocks:
                start = index * self.grain
                block = Block(slots.copy_out(row, start, start + self.grain))
                if block.nbytes > self._most_bytes:
                    return
                self._add(name, block)
            self._blocks.move_to_end(name)
        self._drop()

    def _add(self, name: bytes, block: Block) -> None:
        self._blocks[name] = block
        self.nbytes += block.nbytes

    def _drop(self) -> None:
        while self.nbytes > self._most_bytes:
            _, block = self._blocks.popitem(last=False)
            self.nbytes -= block.nbytes

    def _names(self, token_ids: Sequence[int]) -> Iterator[bytes]:
        """The name of each whole block: a hash of its tokens and of all before them."""
        name = b""
        for start in range(0, len(token_ids) // self.grain * self.grain, self.grain):
            block = np.array(token_ids[start : start + self.grain], dtype=np.int64)
            name = hashlib.blake2b(name + block.tobytes(), digest_size=20).digest()
            yield name
