"""TensorRT behind the session protocol: a plan, on the GPU that it was built for.

Decode and prompt have a context each, on the plan's two profiles. They share the weights and the KV cache,
into which the plan writes new keys and values in place.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from qrun.backends.kvcache import KVCache
from qrun.backends.token_ids import check_token_ids
from qrun.backends.trt.cache import TrtKVCache
from qrun.backends.trt.checks import check_device_memory, check_runnable, load_backend_module
from qrun.backends.trt.context import ProfileContext
from qrun.backends.trt.cuda import Stream, open_device
from qrun.backends.trt.engine import Engine
from qrun.errors import QrunError
from qrun.folder.manifest import Manifest
from qrun.folder.plan import PlanFacts


class TrtSession:
    """A plan, opened; see ``session.Session`` for the protocol.

    The GPU's memory is given back by ``close``, at the end of a ``with`` block, or with the session itself.

    Attributes:
        gpu: the GPU that it runs on.

    Args:
        manifest: of the plan's folder.
        facts: the plan's sidecar.
        cuda_graph: record the decode step once and launch it by one call from then on.

    Raises:
        QrunError: no GPU, another TensorRT or GPU than the plan was built for, altered bytes, too little
            memory, or TensorRT's own refusal.
    """

    def __init__(self, manifest: Manifest, facts: PlanFacts, *, cuda_graph: bool = True) -> None:
        self.manifest = manifest
        module = load_backend_module(facts)
        self.gpu = open_device()
        check_runnable(facts, str(module.__version__), self.gpu.compute_capability)
        facts.check_belongs(manifest)
        free = self.gpu.free_bytes()
        check_device_memory(facts, manifest, free)
        facts.check_bytes()
        self.device = f"{self.gpu.name}, {facts.title}"
        self._caches: weakref.WeakSet[TrtKVCache] = weakref.WeakSet()
        # Closed in reverse order: graphs and contexts first, then caches, then the engine, the stream last.
        with ExitStack() as resources:
            self._stream = Stream()
            resources.callback(self._stream.close)
            self._engine = Engine(facts, module)
            resources.callback(self._engine.close)
            resources.callback(_close_caches, self._caches)
            self._decode, self._prompt = self._open_contexts(free, resources, cuda_graph)
            self._closing = weakref.finalize(self, resources.pop_all().close)

    def new_cache(self, batch: int = 1, *, in_place: bool = True) -> TrtKVCache:
        if batch != 1:
            raise self._one_sequence(batch)
        if not in_place:
            raise QrunError(
                "the KV cache of a plan has a fixed length, it cannot grow",
                where=self.manifest.folder,
                hint="use a cache in place",
            )
        cache = TrtKVCache(self.manifest, self._engine, self.gpu, self._stream)
        self._caches.add(cache)
        return cache

    def reads_last_apart(self, new: int) -> bool:
        return False

    def forward(
        self, token_ids: NDArray[np.int64], cache: KVCache, logits: str = "last"
    ) -> NDArray[np.float32]:
        assert isinstance(cache, TrtKVCache), "the cache belongs to another session"
        assert cache.engine is self._engine, "the cache belongs to another session"
        assert self._closing.alive, "the session is closed"
        batch, new = token_ids.shape
        if batch != 1:
            raise self._one_sequence(batch)
        check_token_ids(token_ids, self.manifest.model.vocab_size)
        cache.reserve(new)
        wanted = {"last": range(new - 1, new), "all": range(new), "none": range(0)}[logits]
        # The cache's own array, and not the page-locked one, which the next answer overwrites.
        result = cache.logits if logits == "last" else self._rows(len(wanted))
        filled = 0
        for start in range(0, new, self._prompt.most_tokens):
            piece = token_ids[0, start : start + self._prompt.most_tokens]
            positions = range(max(wanted.start - start, 0), min(wanted.stop - start, len(piece)))
            for rows in self._feed(piece, cache.length + start, positions, cache):
                result[0, filled : filled + len(rows)] = rows
                filled += len(rows)
        assert filled == len(wanted)
        cache.advance(new)
        return result

    @property
    def graph_state(self) -> str:
        """State of the decode step's CUDA graph: "off", "not yet", "captured", or why it was refused."""
        return self._decode.graph_state

    def close(self) -> None:
        """Give the GPU's memory back; the session and its caches cannot be used any more."""
        self._closing()

    def __enter__(self) -> TrtSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _feed(
        self, piece: NDArray[np.int64], start: int, positions: range, cache: TrtKVCache
    ) -> Iterator[NDArray[np.float32]]:
        """Run one piece, and yield logits in the order of ``positions``, each part valid until the next.

        A plan computes logits for few positions at once, since those of a whole prompt would take more memory
        than the model. For more of them the piece runs again: it writes the same keys and values.
        """
        context = self._decode if len(piece) == 1 else self._prompt
        if not positions:
            context.run(piece, start, range(1), cache)
        for first in range(0, len(positions), context.most_positions):
            yield context.run(piece, start, positions[first : first + context.most_positions], cache)

    def _open_contexts(
        self, free: int, resources: ExitStack, cuda_graph: bool
    ) -> tuple[ProfileContext, ProfileContext]:
        """One for single tokens and one for prompts, on the shortest profile and the longest."""
        facts, vocab_size = self._engine.facts, self.manifest.model.vocab_size
        lengths = [profile.most for profile in facts.profiles]
        chosen = lengths.index(min(lengths)), lengths.index(max(lengths))
        scratch = sum(self._engine.scratch_bytes(profile) for profile in chosen)
        check_device_memory(facts, self.manifest, free, scratch)
        decode, prompt = (
            ProfileContext(self._engine, profile, self._stream, vocab_size, resources, cuda_graph=cuda_graph)
            for profile in chosen
        )
        return decode, prompt

    def _rows(self, count: int) -> NDArray[np.float32]:
        return np.empty((1, count, self.manifest.model.vocab_size), dtype=np.float32)

    def _one_sequence(self, batch: int) -> QrunError:
        return QrunError(
            f"a plan runs one sequence at a time, not {batch}",
            where=self.manifest.folder,
            hint="run them one after another, each with a cache of its own",
        )


def _close_caches(caches: weakref.WeakSet[TrtKVCache]) -> None:
    for cache in list(caches):
        cache.close()
