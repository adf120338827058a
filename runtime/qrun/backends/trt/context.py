"""One optimisation profile of a plan, ready to run: its execution context, buffers and CUDA graph."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.backends.trt.cache import TrtKVCache
from qrun.backends.trt.cuda import DeviceBuffer, Graph, HostBuffer, Stream
from qrun.backends.trt.engine import LOGITS_OUTPUT, POSITIONS_INPUT, TOKEN_INPUTS, Engine
from qrun.errors import QrunError


class StagedTensor:
    """A small input or output: the GPU's buffer, and the page-locked array that it is copied from or to."""

    def __init__(self, shape: tuple[int, ...], dtype: str, resources: ExitStack) -> None:
        self._host = HostBuffer(shape, dtype)
        resources.callback(self._host.close)
        self._device = DeviceBuffer(self._host.nbytes)
        resources.callback(self._device.close)

    @property
    def array(self) -> NDArray[Any]:
        return self._host.array

    @property
    def address(self) -> int:
        return self._device.address

    def upload(self, stream: Stream, rows: int) -> None:
        stream.to_device(self._device, self._host, self.array[:rows].nbytes)

    def download(self, stream: Stream, rows: int) -> None:
        stream.to_host(self._host, self._device, self.array[:rows].nbytes)


class ProfileContext:
    """Runs up to ``most_tokens`` new tokens of one sequence at once.

    Where a profile has one shape only (the decode step), its work is recorded once as a CUDA graph and
    launched by one call from then on; addresses and shapes stay the same, only the buffers' content changes.

    Attributes:
        most_tokens: that the profile allows at once.
        most_positions: how many of these can have their logits computed at once.
        graph_state: "off", "not yet", "captured", or why it was refused.
    """

    def __init__(
        self,
        engine: Engine,
        profile: int,
        stream: Stream,
        vocab_size: int,
        resources: ExitStack,
        *,
        cuda_graph: bool,
    ) -> None:
        self.most_tokens = engine.most(TOKEN_INPUTS[0], profile)[1]
        self.most_positions = engine.most(POSITIONS_INPUT, profile)[0]
        self._engine = engine
        self._stream = stream
        self._token_ids, self._position_ids = (
            StagedTensor((self.most_tokens,), "int64", resources) for _ in TOKEN_INPUTS
        )
        self._logits_positions = StagedTensor((self.most_positions,), "int64", resources)
        self._logits = StagedTensor((self.most_positions, vocab_size), "float32", resources)
        self._context = engine.new_context(profile, stream)
        resources.callback(self._drop_context)
        self._graph: Graph | None = None
        resources.callback(self._drop_graph)
        self.graph_state = "not yet" if cuda_graph and self.most_tokens == self.most_positions == 1 else "off"
        self._warm = False
        self._shape: tuple[int, int] | None = None
        self._bound: weakref.ref[TrtKVCache] | None = None
        for name, tensor in self._small_tensors().items():
            self._set_address(name, tensor.address)

    def run(
        self, token_ids: NDArray[np.int64], start: int, positions: Sequence[int], cache: TrtKVCache
    ) -> NDArray[np.float32]:
        """Feed tokens at ``start`` of the cache; feeding them again writes the same keys and values.

        Args:
            token_ids: int64 ``[new]``.
            start: tokens in the cache before them.
            positions: the new tokens whose logits are wanted, ``most_positions`` at most and one at least.
            cache: this session's, with room for them.

        Returns:
            float32 ``[positions, vocab]``, the context's own buffer: valid until the next call.

        Raises:
            QrunError: TensorRT or CUDA refuses.
        """
        new = len(token_ids)
        assert 1 <= new <= self.most_tokens
        assert 1 <= len(positions) <= self.most_positions
        self._bind(cache)
        self._set_shapes(new, len(positions))
        self._token_ids.array[:new] = token_ids
        self._position_ids.array[:new] = np.arange(start, start + new)
        self._logits_positions.array[: len(positions)] = positions
        try:
            self._go()
        finally:
            # After an error too: the next call would write into arrays that are still being copied.
            self._stream.synchronize()
        return self._logits.array[: len(positions)]

    def _go(self) -> None:
        if self.graph_state == "not yet" and self._capturable():
            try:
                self._graph = self._stream.capture(self._enqueue)
                self.graph_state = "captured"
            except QrunError as error:  # go on without a graph: it only makes steps faster
                self.graph_state = f"refused: {error.what}"
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._enqueue()
            self._warm = True

    def _capturable(self) -> bool:
        # TensorRT allocates and compiles in its first run with new shapes and addresses: capture a later one.
        if not self._warm:
            return False
        # TensorRT-RTX answers no while it still compiles kernels; TensorRT has no such method.
        ask = getattr(self._context, "is_stream_capturable", None)
        return ask is None or bool(ask(self._stream.handle))

    def _enqueue(self) -> None:
        assert self._shape is not None
        new, positions = self._shape
        self._token_ids.upload(self._stream, new)
        self._position_ids.upload(self._stream, new)
        self._logits_positions.upload(self._stream, positions)
        self._engine.check(self._context.execute_async_v3(self._stream.handle), "run the plan")
        self._logits.download(self._stream, positions)

    def _bind(self, cache: TrtKVCache) -> None:
        """Bind past and present of every layer to the cache; drop the graph, which has the old addresses."""
        if self._bound is not None and self._bound() is cache:
            return
        self._drop_graph()
        self._bound = None
        for past, present in self._engine.caches.items():
            buffer = cache.buffers[past]
            self._set_address(past, buffer.address)
            self._set_address(present, buffer.address)
            self._set_shape(past, self._engine.cache_shape(past))
        self._bound = weakref.ref(cache)

    def _set_shapes(self, new: int, positions: int) -> None:
        if self._shape == (new, positions):
            return
        self._drop_graph()
        self._shape = None
        for name in TOKEN_INPUTS:
            self._set_shape(name, (1, new))
        self._set_shape(POSITIONS_INPUT, (positions,))
        if unspecified := self._context.infer_shapes():
            raise self._engine.refusal(f"wants more to be known of {', '.join(unspecified)}")
        self._shape = (new, positions)

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        self._engine.check(self._context.set_input_shape(name, shape), f"take {name} as {list(shape)}")

    def _set_address(self, name: str, address: int) -> None:
        self._engine.check(self._context.set_tensor_address(name, address), f"place {name}")

    def _small_tensors(self) -> dict[str, StagedTensor]:
        return {
            **dict(zip(TOKEN_INPUTS, (self._token_ids, self._position_ids))),
            POSITIONS_INPUT: self._logits_positions,
            LOGITS_OUTPUT: self._logits,
        }

    def _drop_graph(self) -> None:
        self._warm = False
        if self._graph is not None:
            self._graph.close()
            self._graph = None
            self.graph_state = "not yet"

    def _drop_context(self) -> None:
        self._context = None
