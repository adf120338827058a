"""A folder for TensorRT by ONNX Runtime's TensorRT provider, which builds its engine as it opens the graph.

The folder's graph for it has standard operators in the model's own half type: the parser behind the provider
refuses ONNX Runtime's operators (GroupQueryAttention, MatMulNBits), and ONNX Runtime refuses TensorRT's.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qrun.backends.kvcache import KVCache
from qrun.backends.ort.static import StaticKVCache, StaticOrtSession, with_graph
from qrun.backends.ort.values import Values
from qrun.errors import QrunError
from qrun.folder.external_data import check_external_data
from qrun.folder.manifest import Manifest
from qrun.folder.paths import own_folder

# As in a plan: longer pieces of a prompt are hardly faster, and their activations take more memory.
MOST_TOKENS = 1024
TYPICAL_TOKENS = 256
_HALF_TYPES = {"float16": ("trt_fp16_enable", 10), "bfloat16": ("trt_bf16_enable", 16)}


def open_provider_session(manifest: Manifest, *, threads: int) -> ProviderSession:
    """Open a folder for TensorRT by ONNX Runtime's TensorRT provider.

    Raises:
        QrunError: another kind of folder, a provider that is not there, or nodes that it leaves to the CPU.
    """
    if manifest.target != "tensorrt":
        raise QrunError(
            "the folder's graph has operators of ONNX Runtime, which TensorRT's parser refuses",
            where=manifest.folder,
            hint="export the checkpoint with --target tensorrt, or use --device cuda or cpu",
        )
    if manifest.kv.dtype not in _HALF_TYPES:
        raise QrunError(
            f"TensorRT has no attention kernel in {manifest.kv.dtype}",
            where=manifest.folder,
            hint="export with --precision bf16, fp16 or int4, or use --device cpu",
        )
    provider = with_graph(manifest, "provider_file")
    check_external_data(provider)
    return ProviderSession(provider, threads=threads)


def provider_options(manifest: Manifest, engine_cache: Path) -> dict[str, str]:
    """Options for ONNX Runtime's TensorRT provider: the half type, the caches and one profile of shapes.

    Source: ONNX Runtime's documentation of its TensorRT execution provider.
    """
    most = min(MOST_TOKENS, manifest.model.context_length)
    return {
        "device_id": "0",
        _HALF_TYPES[manifest.kv.dtype][0]: "True",
        "trt_layer_norm_fp32_fallback": "True",
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(engine_cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(engine_cache),
        "trt_profile_min_shapes": _shapes(manifest, 1),
        "trt_profile_opt_shapes": _shapes(manifest, min(TYPICAL_TOKENS, most)),
        "trt_profile_max_shapes": _shapes(manifest, most),
    }


def engine_cache_of(manifest: Manifest) -> Path:
    """Where the provider keeps its engines: among the user's caches, since qrun changes no model folder.

    The name holds the hashes of graph and weights, so that a new export never meets an old engine.
    """
    hashes = sorted(f"{e.path} {e.sha256}" for e in manifest.files if e.path.startswith(manifest.graph))
    hashes += [e.sha256 for e in manifest.files if e.path.endswith(".data")]
    base = own_folder("XDG_CACHE_HOME", ".cache")
    if base is None:
        raise QrunError(
            "there is no home folder to keep TensorRT's engines in",
            hint="set XDG_CACHE_HOME to a folder that can be written",
        )
    return base / "qrun" / "tensorrt" / hashlib.sha256("\n".join(hashes).encode()).hexdigest()[:16]


def _shapes(manifest: Manifest, tokens: int) -> str:
    """One sequence of so many tokens, logits of one position, the cache at its only length."""
    facts = manifest.model
    cache = f"1x{facts.num_key_value_heads}x{facts.context_length}x{facts.head_size}"
    shapes = {"input_ids": f"1x{tokens}", "position_ids": f"1x{tokens}", "logits_positions": "1"}
    for layer in range(facts.num_hidden_layers):
        for part in ("key", "value"):
            shapes[f"past_key_values.{layer}.{part}"] = cache
    return ",".join(f"{name}:{shape}" for name, shape in shapes.items())


class ProviderSession(StaticOrtSession):
    """See ``session.Session`` for the protocol: one sequence, and logits of the last position.

    Raises:
        QrunError: wrong ONNX Runtime wheels, no TensorRT provider, or a graph that it does not take whole.
    """

    def __init__(self, manifest: Manifest, *, threads: int) -> None:
        self._engine_cache = engine_cache_of(manifest)
        super().__init__(manifest, threads=threads, device="tensorrt")
        self.device = "CUDA device 0, ONNX Runtime's TensorRT provider"

    def providers(self, device: str) -> list[Any]:
        try:
            self._engine_cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QrunError(
                f"the folder for TensorRT's engines cannot be made: {error.strerror}",
                where=self._engine_cache,
                hint="set XDG_CACHE_HOME to a folder that can be written",
            ) from error
        options = provider_options(self.manifest, self._engine_cache)
        cuda, cpu = super().providers("cuda")
        return [(super().providers(device)[0], options), cuda, cpu]

    def new_cache(self, batch: int = 1, *, in_place: bool = True) -> StaticKVCache:
        if batch != 1:
            raise QrunError(
                f"the TensorRT provider runs one sequence at a time here, not {batch}",
                where=self.manifest.folder,
                hint="run them one after another, each with a cache of its own",
            )
        self.check_in_place(in_place)
        return ProviderKVCache(self.values, self._inference, batch)

    def forward(
        self, token_ids: NDArray[np.int64], cache: KVCache, logits: str = "last"
    ) -> NDArray[np.float32]:
        new, most = token_ids.shape[1], min(MOST_TOKENS, self.manifest.model.context_length)
        if logits == "all" and new > 1:
            raise QrunError(
                "the TensorRT provider is given shapes for the logits of one position",
                where=self.manifest.folder,
                hint="ask for the last position, or use --device cpu",
            )
        cache.check_limit(cache.length + new)
        for start in range(0, new - most, most):
            super().forward(token_ids[:, start : start + most], cache, "none")
        return super().forward(token_ids[:, (max(new, 1) - 1) // most * most :], cache, logits)

    def _values(self, device: str) -> ProviderValues:
        return ProviderValues(self._ort, self.manifest, device)


class ProviderValues(Values):
    """Memory of the GPU."""

    def allocate(self, array: NDArray[Any]) -> Any:
        """A copy on the GPU; NumPy has no bfloat16, whose bits are copied from memory of the CPU."""
        element = _HALF_TYPES[self.manifest.kv.dtype][1]
        here = self.runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, element)
        there = self.runtime.OrtValue.ortvalue_from_shape_and_type(array.shape, element, self.device_type, 0)
        there.update_inplace(here)
        return there


class ProviderKVCache(StaticKVCache):
    """Always binds the logits of one position, since the profile has no shape for none."""

    def bind(self, new: int, logits: str) -> Any:
        return super().bind(new, "last")

    def logits(self, new: int, logits: str) -> NDArray[np.float32]:
        return super().logits(new, "last")[:, : 0 if logits == "none" else None]
