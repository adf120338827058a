"""The one interface behind which every backend runs a model.

    session = open_session("./model-folder")
    cache = session.new_cache()
    logits = session.forward(token_ids, cache)     # token_ids int64 [batch, new]; float32 [batch, 1, vocab]

``forward`` appends to the cache at each row's own length: the position of a token is the number of
tokens that were in its row before it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qrun.backends.kvcache import KVCache
from qrun.backends.ort.processor import check_integer_products, usable_cores
from qrun.errors import QrunError
from qrun.folder.external_data import check_external_data
from qrun.folder.manifest import Manifest, names_plan, read_manifest

__all__ = ["Device", "LogitsFor", "PromptGraph", "Session", "open_session", "usable_cores"]

LogitsFor = Literal["last", "all", "none"]
Device = Literal["cpu", "cuda", "tensorrt"]
PromptGraph = bool | Literal["later"]


class Session(Protocol):
    """A model that is ready to run.

    Attributes:
        manifest: what the model is.
        device: where it really runs, for people: "CPU, 2 threads".
    """

    manifest: Manifest
    device: str

    def new_cache(self, batch: int = 1, *, in_place: bool = True) -> KVCache:
        """An empty KV cache for this session.

        Args:
            batch: number of sequences.
            in_place: past and present share one buffer (fast). False gives the form in which every
                step returns longer tensors, as other programs run the same graph.
        """
        ...

    def forward(
        self, token_ids: NDArray[np.int64], cache: KVCache, logits: LogitsFor = "last"
    ) -> NDArray[np.float32]:
        """Run new tokens through the decoder and append their keys and values to the cache.

        Args:
            token_ids: int64 ``[batch, new]``.
            cache: from this session's ``new_cache``; grown as needed and advanced by ``new``.
            logits: for which of the new positions to compute logits.

        Returns:
            float32 ``[batch, positions, vocab]`` with 1, new or 0 positions. For "last" it is the
            session's own buffer: copy it to keep it beyond the next call.

        Raises:
            QrunError: a token id outside the vocabulary, or more tokens than the context holds.
        """
        ...


def open_session(
    path: str | Path,
    *,
    device: Device = "cpu",
    threads: int | None = None,
    check_hashes: bool = False,
    prefill_graph: PromptGraph = True,
    cuda_graph: bool = True,
) -> Session:
    """Open a model folder, or a .onnx file or a .plan inside one.

    Args:
        path: the folder that ``qconvert export`` wrote, or the plan that ``qconvert build`` put there.
        device: "cpu", "cuda" or "tensorrt" (ONNX Runtime's TensorRT provider). There is no silent fall-back
            from one to the other. A plan runs on the GPU that it was built for, whatever stands here.
        threads: threads within an operator; by default the cores that the process may use.
        check_hashes: hash every file against the manifest first (sizes are always checked).
        prefill_graph: open a folder's second graph for prompts as well; without it less memory is used. With
            "later" another thread opens it, and the first prompt that needs it waits for it (and meets its
            errors): for whoever gives a person time to type.
        cuda_graph: record a plan's decode step and launch it as a whole; for other models it means nothing.

    Raises:
        QrunError: the folder is not whole, not ours or too new, the options do not fit together, or
            the device cannot run the model.
    """
    if threads is not None and threads < 1:
        raise QrunError(f"threads is {threads}: it must be at least 1")
    if names_plan(path):
        return _open_plan(path, check_hashes, cuda_graph)
    manifest = read_manifest(path)
    manifest.check_files(hashes=check_hashes)
    if not prefill_graph:
        manifest = replace(manifest, prefill=None)
    if manifest.target not in ("onnxruntime", "tensorrt"):
        raise QrunError(
            f'the folder holds a model for "{manifest.target}", which this qrun cannot run',
            where=manifest.folder,
            hint="export it with `qconvert export CHECKPOINT` (target onnxruntime)",
        )
    if device not in ("cpu", "cuda", "tensorrt"):
        raise QrunError(f'unknown device "{device}"', hint="use cpu, cuda or tensorrt")
    threads = threads or usable_cores()
    if device == "tensorrt":
        from qrun.backends.ort.provider import open_provider_session

        return open_provider_session(manifest, threads=threads)
    if manifest.target == "tensorrt":
        return _open_standard_graph(manifest, device, threads)
    check_external_data(manifest)
    if device == "cpu":
        check_integer_products(manifest, prefill_graph=bool(prefill_graph))
    from qrun.backends.ort.session import OrtSession

    return OrtSession(manifest, device=device, threads=threads, prompts_later=prefill_graph == "later")


def _open_plan(path: str | Path, check_hashes: bool, cuda_graph: bool) -> Session:
    from qrun.backends.trt.session import TrtSession
    from qrun.folder.plan import read_plan

    facts = read_plan(path)
    manifest = read_manifest(path)
    # A plan holds graph and weights: it runs without the ONNX files, and opening it hashes its own bytes.
    if check_hashes:
        manifest.check_files(hashes=True)
    return TrtSession(manifest, facts, cuda_graph=cuda_graph)


def _open_standard_graph(manifest: Manifest, device: Device, threads: int) -> Session:
    """A folder for TensorRT without TensorRT: its graph in standard operators, on the CPU."""
    from qrun.backends.ort.static import StaticOrtSession, with_graph

    if device != "cpu":
        raise QrunError(
            "a folder for TensorRT runs through TensorRT or on the CPU, not on ONNX Runtime's CUDA kernels",
            where=manifest.folder,
            hint="build it with `qconvert build FOLDER`, or use --device tensorrt or --device cpu",
        )
    standard = with_graph(manifest, "standard_file")
    check_external_data(standard)
    return StaticOrtSession(standard, threads=threads)
