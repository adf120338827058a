"""ONNX Runtime behind the session protocol.

One decode step does no allocation and no work per layer in Python: the KV buffers, the token and the
logits stay bound, and only the attention mask, which grows by one at each step, is bound again.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.backends.kvcache import KVCache
from qrun.backends.ort.attention import BY_GROUPS, most_tokens
from qrun.backends.ort.cache import GrowingKVCache, InPlaceKVCache, OrtKVCache
from qrun.backends.ort.prefill import PrefillGraph
from qrun.backends.ort.values import Values
from qrun.backends.ort.wheels import check_onnxruntime_version, check_onnxruntime_wheels, numbers
from qrun.backends.token_ids import check_token_ids
from qrun.errors import QrunError
from qrun.folder.external_data import DATA_FOLDER, with_true_places
from qrun.folder.manifest import Manifest
from qrun.folder.paths import RawPath

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_HOW_TO_GET = {
    "cuda": "check the NVIDIA driver and CUDA libraries",
    "tensorrt": "check the NVIDIA driver, and that this ONNX Runtime finds the version of NVIDIA's TensorRT "
    "libraries that it was built for; or build a plan with `qconvert build FOLDER`, which needs neither",
}
_FREE_MEMORY = "free some memory, or use a shorter context"
_UPDATE = (
    "update ONNX Runtime (pip install -U onnxruntime); if that does not help, check the folder with "
    "`qconvert verify`, or export the model again"
)
# Operators on int64 shapes and lengths, which ONNX Runtime rightly keeps on the CPU beside any device.
_SHAPE_OPERATORS = frozenset({"Shape", "Gather", "ReduceSum", "Sub", "Cast", "Slice", "Squeeze", "Unsqueeze"})
# What attention by groups makes of lengths, once for all layers; a GPU is never asked for it.
_OF_LENGTHS = f"/{BY_GROUPS}/"


class OrtSession:
    """A model folder opened by ONNX Runtime; see ``session.Session`` for the protocol.

    Args:
        manifest: the folder's facts.
        device: "cpu", "cuda" or "tensorrt".
        threads: threads within an operator.
        prompts_later: do not wait for the folder's second graph, which another thread opens; the first prompt
            that needs it waits, and raises its errors.

    Raises:
        QrunError: wrong ONNX Runtime wheels, a graph that does not load, or a device that is not there.
    """

    def __init__(self, manifest: Manifest, *, device: str, threads: int, prompts_later: bool = False) -> None:
        check_onnxruntime_wheels(device)
        import onnxruntime

        check_onnxruntime_version(manifest, onnxruntime.__version__)
        # Where no logits are wanted the last layer has no rows. Before 1.32 products of 8-bit weights fail
        # there, and in some versions those of 4-bit weights end the process.
        packed = manifest.precision in ("int8", "int4")
        self._takes_no_rows = not packed or numbers(onnxruntime.__version__) >= (1, 32)
        self.manifest = manifest
        self.threads = threads
        self._ort = onnxruntime
        self._check_provider(device, onnxruntime.get_available_providers())
        self._prefill: PrefillGraph | None = None
        # Opening a graph keeps one thread busy with rearranging weights, so two graphs are opened at once.
        if manifest.prefill is not None and (path := manifest.prefill_path) is not None:
            other = ThreadPoolExecutor(1, "open-prefill")
            self._prefill = PrefillGraph(other.submit(self._open, device, path), manifest.prefill.min_tokens)
            other.shutdown(wait=False)
        self._inference = self._open(device, manifest.graph_path)
        if self._prefill is not None and not prompts_later:
            _ = self._prefill.inference  # waits, and raises what opening it has raised
        self.device = (
            f"CPU, {threads} thread{'s' if threads > 1 else ''}" if device == "cpu" else "CUDA device 0"
        )
        self.values = self._values(device)

    def new_cache(self, batch: int = 1, *, in_place: bool = True) -> OrtKVCache:
        return (InPlaceKVCache if in_place else GrowingKVCache)(self.values, self._inference, batch)

    def reads_last_apart(self, new: int) -> bool:
        return self._prefill is not None and new - 1 >= self._prefill.min_tokens

    def forward(
        self, token_ids: NDArray[np.int64], cache: KVCache, logits: str = "last"
    ) -> NDArray[np.float32]:
        assert isinstance(cache, OrtKVCache), "the cache belongs to another session"
        assert cache.values is self.values, "the cache belongs to another session"
        batch, new = token_ids.shape
        assert batch == cache.batch, f"tokens for {batch} rows, the cache has {cache.batch}"
        check_token_ids(token_ids, self.manifest.model.vocab_size)
        before = cache.lengths.copy()
        try:
            cache.reserve(new)  # for all rows, before the first one is read
            if batch == 1 or new == 1 or self._reads_at_once(batch, new, cache):
                return self._read(token_ids, cache, logits)
            parts = [self._read(token_ids[row : row + 1], cache.rows(row, 1), logits) for row in range(batch)]
            return np.concatenate(parts)
        except BaseException as error:
            cache.put_back(before)
            if isinstance(error, QrunError) or not isinstance(error, Exception):
                raise
            # ONNX Runtime has no base class for its errors.
            raise QrunError(
                f"ONNX Runtime {self._ort.__version__} cannot run the graph: {_reason(error)}",
                where=self.manifest.graph_path,
                hint=_FREE_MEMORY if "alloc" in str(error) else _UPDATE,
            ) from error

    def _reads_at_once(self, batch: int, new: int, cache: OrtKVCache) -> bool:
        """Whether several tokens of several rows go through the graph together, and not row by row.

        ``GroupQueryAttention`` takes several tokens for one row only, unless all rows are empty.

        Raises:
            QrunError: neither is possible.
        """
        if cache.takes_several:
            return True
        most = self._most_tokens(new, batch)
        growing = isinstance(cache, GrowingKVCache)
        if growing and cache.length:
            raise QrunError(
                f"{batch} sequences in a growing cache cannot each take {new} more tokens in one step",
                hint="give their prompts whole, and then one token at a time; or use a cache in place",
            )
        return growing or (cache.length == 0 and (most is None or new <= most))

    def _most_tokens(self, total: int, rows: int = 1) -> int | None:
        """How many of ``total`` tokens may be read at once; None where there is no such bound.

        The bound comes from attention on the CPU, which computes all scores in one matrix.
        """
        if not self.values.on_cpu:
            return None
        return most_tokens(total, rows * self.manifest.model.num_attention_heads)

    def _read(self, token_ids: NDArray[np.int64], cache: OrtKVCache, logits: str) -> NDArray[np.float32]:
        """Read tokens, many of them in pieces; the cuts depend on the numbers of new and cached tokens."""
        new = token_ids.shape[1]
        if cache.batch == 1 and new > 1 and logits != "all":
            most = self._most_tokens(cache.length + new)
            while most is not None and new > most:
                self._read_piece(token_ids[:, :most], cache, "none")
                token_ids, new = token_ids[:, most:], new - most
        return self._read_piece(token_ids, cache, logits)

    def _read_piece(
        self, token_ids: NDArray[np.int64], cache: OrtKVCache, logits: str
    ) -> NDArray[np.float32]:
        batch, new = token_ids.shape
        if self._prefill is not None and (count := self._prefill.share(new, logits, cache)):
            self._prefill.read(token_ids[:, :count], cache)
            token_ids, new = token_ids[:, count:], new - count
            if not new:
                return np.empty((batch, 0, self.manifest.model.vocab_size), dtype=np.float32)
        computed = "last" if logits == "none" and not self._takes_no_rows else logits
        binding = cache.bind(new, computed)
        cache.token_ids(new)[...] = token_ids
        self._inference.run_with_iobinding(binding)
        cache.collect()
        cache.advance(new)
        found = cache.logits(new, computed)
        return found[:, :0] if logits == "none" else found

    def _values(self, device: str) -> Values:
        return Values(self._ort, self.manifest, device)

    def _open(self, device: str, graph: Path) -> Any:
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Every shape is dynamic: an allocation pattern of one step would be wrong for the next.
        options.enable_mem_pattern = False
        if self.manifest.prefill is not None:
            # Each graph has its own threads, and those of an idle graph would spin on the other one's cores.
            options.add_session_config_entry("session.force_spinning_stop", "1")
        if device != "cpu":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        providers = self.providers(device)
        model: RawPath | bytes = RawPath(graph)
        if (moved := with_true_places(graph)) is not None:
            model = moved
            options.add_session_config_entry(DATA_FOLDER, graph.resolve().anchor)
        try:
            # With its fall-back enabled ONNX Runtime would print, and try another device than was asked for.
            inference = self._ort.InferenceSession(model, options, providers=providers, enable_fallback=False)
        except Exception as error:  # ONNX Runtime has no base class for its errors
            raise QrunError(
                f"ONNX Runtime {self._ort.__version__} cannot open the graph: {_reason(error)}",
                where=graph,
                hint=_UPDATE,
            ) from error
        self._check_provider(device, inference.get_providers())
        self._check_nodes(device, inference)
        return inference

    def providers(self, device: str) -> list[Any]:
        """Execution providers, the preferred one first; the CPU's is only for shapes (``_check_nodes``)."""
        return list(dict.fromkeys([_PROVIDERS[device], _PROVIDERS["cpu"]]))

    @staticmethod
    def _check_provider(device: str, providers: list[str]) -> None:
        if _PROVIDERS[device] not in providers:
            raise QrunError(
                f"{_PROVIDERS[device]} is not available: ONNX Runtime would have run on the CPU instead",
                hint=f"{_HOW_TO_GET.get(device, 'install ONNX Runtime again')}; or use --device cpu",
            )

    @staticmethod
    def _check_nodes(device: str, inference: Any) -> None:
        if device != "cpu" and (strays := nodes_on_cpu(inference)):
            raise QrunError(
                f"{len(strays)} nodes would run on the CPU, not on {device}: {', '.join(strays[:5])}",
                hint="update onnxruntime-gpu, or use --device cpu",
            )


def _reason(error: Exception) -> str:
    """The first line of what ONNX Runtime says, without its prefix."""
    lines = re.sub(r"\[ONNXRuntimeError\] : \d+ : ", "", str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


def nodes_on_cpu(inference: Any) -> list[str]:
    """Names of the computing nodes that a session has assigned to the CPU (see ``_SHAPE_OPERATORS``)."""
    return [
        node.name
        for subgraph in inference.get_provider_graph_assignment_info()
        if subgraph.ep_name == "CPUExecutionProvider"
        for node in subgraph.get_nodes()
        if node.op_type not in _SHAPE_OPERATORS and not node.name.startswith(_OF_LENGTHS)
    ]
