"""Opens a session for a path; which backend runs it is decided here and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from qrun.backends.ort.processor import check_integer_products
from qrun.backends.session import Session
from qrun.errors import QrunError
from qrun.folder.external_data import check_external_data
from qrun.folder.manifest import Manifest, names_plan, read_manifest
from qrun.machine import usable_cores

if TYPE_CHECKING:
    from typing_extensions import Unpack

Device = Literal["cpu", "cuda", "tensorrt"]
PromptGraph = bool | Literal["later"]


class Opening(TypedDict, total=False):
    """How a model folder is opened: the options of ``open_session``, described only here.

    Attributes:
        device: "cpu" (the default), "cuda" or "tensorrt" (ONNX Runtime's TensorRT provider). There is no
            silent fall-back from one to the other. For a plan it has no meaning.
        threads: threads within an operator; by default the cores that the process may use.
        check_hashes: hash every file against the manifest first (sizes are always checked). Default: no.
        prefill_graph: open a folder's second graph for prompts as well (the default); without it less memory
            is used. With "later" another thread opens it while a person types, say; the first prompt that
            needs it waits for it, and raises its errors.
        cuda_graph: record a plan's decode step and launch it as a whole (the default); for other models it
            has no meaning.
    """

    device: Device
    threads: int | None
    check_hashes: bool
    prefill_graph: PromptGraph
    cuda_graph: bool


_DEFAULTS = Opening(device="cpu", threads=None, check_hashes=False, prefill_graph=True, cuda_graph=True)


def open_session(path: str | Path, **options: Unpack[Opening]) -> Session:
    """Open a model folder, or a .onnx file or a .plan inside one.

    Args:
        path: the folder that ``qconvert export`` wrote, or the plan that ``qconvert build`` put there.
        options: see ``Opening``.

    Raises:
        QrunError: the folder is not whole, not ours or too new, the options do not fit together, or
            the device cannot run the model.
    """
    if unknown := options.keys() - _DEFAULTS.keys():
        raise TypeError(f"no such option: {', '.join(sorted(unknown))}; there are {', '.join(_DEFAULTS)}")
    how: Opening = {**_DEFAULTS, **options}
    threads, device, prefill_graph = how["threads"], how["device"], how["prefill_graph"]
    if threads is not None and threads < 1:
        raise QrunError(f"threads is {threads}: it must be at least 1")
    if device not in ("cpu", "cuda", "tensorrt"):
        raise QrunError(f'unknown device "{device}"', hint="use cpu, cuda or tensorrt")
    if names_plan(path):
        return _open_plan(path, how["check_hashes"], how["cuda_graph"])
    manifest = read_manifest(path)
    manifest.check_files(hashes=how["check_hashes"])
    if not prefill_graph:
        manifest = replace(manifest, prefill=None)
    if manifest.target not in ("onnxruntime", "tensorrt"):
        raise QrunError(
            f'the folder holds a model for "{manifest.target}", which this qrun cannot run',
            where=manifest.folder,
            hint="export it with `qconvert export CHECKPOINT` (target onnxruntime)",
        )
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
