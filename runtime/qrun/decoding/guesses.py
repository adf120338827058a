"""How a text may go on, guessed from the text itself: what followed where its last tokens stood before.

Source: Saxena 2023, "Prompt Lookup Decoding" (github.com/apoorvumang/prompt-lookup-decoding); the longest
match first, as in Hu et al. 2024, "SAM Decoding" (arXiv:2411.10666).
"""

from __future__ import annotations

from collections.abc import Iterable

# Tokens that must agree before anything is guessed: one alone agrees by chance.
_LEAST = 2
# Tokens of a match that are compared at most: longer ones make no guess more likely.
_MOST = 32
# Of the places where the last two tokens stood before, so many of the latest are compared.
_PLACES = 8


class TextGuesses:
    """A text's tokens, and where each pair of neighbours stands in it.

    Attributes:
        token_ids: the text so far.
    """

    def __init__(self, token_ids: Iterable[int] = ()) -> None:
        self.token_ids: list[int] = []
        self._places: dict[tuple[int, int], list[int]] = {}
        self.extend(token_ids)

    def extend(self, token_ids: Iterable[int]) -> None:
        """Go on with the text."""
        ids = self.token_ids
        for token_id in token_ids:
            # A pair is entered when its successor is known, so the end of the text does not match itself.
            if len(ids) >= _LEAST:
                places = self._places.setdefault((ids[-2], ids[-1]), [])
                places.append(len(ids))
                if len(places) > 2 * _PLACES:
                    del places[:_PLACES]
            ids.append(token_id)

    def guess(self, most: int) -> tuple[list[int], int]:
        """What may come next.

        Args:
            most: how many tokens at most.

        Returns:
            The tokens that followed where the end of the text stood before; none where it did not. And how
            many tokens there agree with the end, ``_MOST`` at most: the more, the likelier is the guess.
        """
        ids = self.token_ids
        if len(ids) < _LEAST:
            return [], 0
        best, length = 0, 0
        for place in reversed(self._places.get((ids[-2], ids[-1]), [])[-_PLACES:]):
            agreeing = self._agreeing(place)
            if agreeing > length:
                best, length = place, agreeing
        return (ids[best : best + most], length) if length else ([], 0)

    def _agreeing(self, place: int) -> int:
        """How many tokens before a place are those at the end of the text."""
        ids, count = self.token_ids, _LEAST
        while count < min(_MOST, place) and ids[place - 1 - count] == ids[-1 - count]:
            count += 1
        return count
