"""Answers that are lists of blocks, of text and of calls: in the newer APIs of OpenAI and Anthropic."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from qrun.answer import Answer, Piece
from qrun.engine import Engine
from qrun.serve.asking import Asked
from qrun.serve.reply import Chunk, Reply
from qrun.serve.stamps import Stamps
from qrun.text.tool_calls import ToolCall


@dataclass
class Block:
    """A part of an answer: text, or the call of a tool.

    Attributes:
        index: its place among the blocks of the answer.
        key: unlike that of any other block, for ids.
        text: so far; of a call, its arguments.
        call: None for text.
    """

    index: int
    key: str
    text: str = ""
    call: ToolCall | None = None


class BlockReply(Reply):
    """A request with one answer. It has at least one block when it has ended, if only an empty text."""

    def __init__(self, engine: Engine, model: str, asked: Asked, stamps: Stamps) -> None:
        super().__init__(engine, model, asked, stamps)
        self.blocks: list[Block] = []
        self._open: Block | None = None  # a text that may go on
        self._parser = self.parser(0)

    def piece(self, index: int, piece: Piece) -> list[Chunk]:
        found = [piece.text] if self._parser is None else self._parser.push(piece.text)
        return [chunk for each in found for chunk in self._take(each)]

    def ended(self, index: int, answer: Answer) -> list[Chunk]:
        found = [] if self._parser is None else self._parser.flush()
        chunks = [chunk for each in found for chunk in self._take(each)]
        if not self.blocks:
            chunks += self._take("")
        return chunks + self._close()

    def finish(self, answer: Answer) -> None:
        """Find the blocks of an answer that is not streamed."""
        self.piece(0, Piece(answer.text))
        self.ended(0, answer)

    @property
    def called(self) -> bool:
        """Whether a tool is called."""
        return any(block.call is not None for block in self.blocks)

    def _take(self, found: str | ToolCall) -> list[Chunk]:
        chunks: list[Chunk] = []
        if isinstance(found, ToolCall):
            chunks += self._close()
            block = self._new(found)
            chunks += self.opened(block)
            block.text = found.arguments
            return chunks + self.added(block, found.arguments) + self.closed(block)
        if self._open is None:
            self._open = self._new(None)
            chunks += self.opened(self._open)
        self._open.text += found
        return chunks + (self.added(self._open, found) if found else [])

    def _new(self, call: ToolCall | None) -> Block:
        self.blocks.append(Block(len(self.blocks), self.stamps.key(), call=call))
        return self.blocks[-1]

    def _close(self) -> list[Chunk]:
        block, self._open = self._open, None
        return [] if block is None else self.closed(block)

    @abstractmethod
    def opened(self, block: Block) -> list[Chunk]:
        """A block begins."""

    @abstractmethod
    def added(self, block: Block, text: str) -> list[Chunk]:
        """More of its text, or all arguments of a call."""

    @abstractmethod
    def closed(self, block: Block) -> list[Chunk]:
        """It is complete."""
