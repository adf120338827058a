"""Another process that rounds layers: short operations of one interpreter's threads wait for one another.

It is this interpreter once more, with this file's ``main``. Tensors lie in memory that both have mapped and
that has no name, so nothing of it is left whatever ends either of them; what they say to one another are
lines of JSON through pipes. Nothing is pickled.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qconvert.calibration.balance import LayerWork
from qconvert.calibration.work import Rounded, Work
from qconvert.formats.folding import FoldedInput
from qconvert.formats.layout import NonFiniteWeightError, PackedWeight
from qconvert.formats.recipe import BlockFormat
from qrun.machine import keep_freed_memory

_ALIGNED = 64
_START = (
    "import gc, sys, json; gc.disable(); sys.path[:] = json.loads(sys.argv[2]); "
    "from qconvert.calibration.helper import main; gc.freeze(); gc.enable(); main(int(sys.argv[1]))"
)
_PARTS = ("data", "scales", "zero_points")


class SharedTensors:
    """Named tensors in memory that two processes have mapped.

    Args:
        descriptor: of the memory.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._map: mmap.mmap | None = None

    def write(self, tensors: Mapping[str, torch.Tensor]) -> list[dict[str, Any]]:
        """Put tensors in place of all that is there; what ``read`` needs to find them."""
        places, end = [], 0
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            places.append({"name": name, "dtype": dtype, "shape": list(tensor.shape), "start": end})
            end += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
        if os.fstat(self._descriptor).st_size < end:
            os.ftruncate(self._descriptor, end)
        for name, there in self.read(places).items():
            there.copy_(tensors[name])
        return places

    def read(self, places: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The tensors where they lie, until somebody writes again."""
        if self._map is None or len(self._map) < os.fstat(self._descriptor).st_size:
            self._map = mmap.mmap(self._descriptor, 0)
        return {place["name"]: _tensor(self._map, place) for place in places}


def _tensor(memory: mmap.mmap, place: Mapping[str, Any]) -> torch.Tensor:
    dtype, shape = getattr(torch, place["dtype"]), place["shape"]
    count = 1
    for size in shape:
        count *= size
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=place["start"]).view(shape)


@dataclass(frozen=True)
class _Given:
    """What was seen of an input, as it came from the other process."""

    squares: torch.Tensor
    sample: torch.Tensor
    products: list[torch.Tensor]


class Helper:
    """The other process; ``with`` starts and ends it.

    Where it cannot be started, or has gone (a system short of memory ends processes), its work is done here.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def __enter__(self) -> Helper:
        if not hasattr(os, "memfd_create"):  # Linux has it
            return self
        self._descriptor = os.memfd_create("qconvert")
        self._shared = SharedTensors(self._descriptor)
        command = [sys.executable, "-c", _START, str(self._descriptor), json.dumps(sys.path)]
        with suppress(OSError):
            self._process = subprocess.Popen(  # noqa: S603
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=(self._descriptor,),
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """``stop``, and give back the memory that both have; it may have been done before."""
        self.stop()
        process, self._process = self._process, None
        if process is not None:
            process.communicate()
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
            del self._descriptor, self._shared

    def stop(self) -> None:
        """End the process, whatever it does; who waits for it gets an ``InterruptedError``."""
        self._stopped = True
        if self._process is not None:
            self._process.kill()

    @property
    def alive(self) -> bool:
        """Whether the next layer is rounded by the other process."""
        return self._process is not None and self._process.poll() is None

    def done(self, work: Work) -> Rounded:
        """``work.done()``, by the other process if it is the recipe awq's.

        Raises:
            NonFiniteWeightError: as there.
        """
        if not isinstance(work, LayerWork):
            return work.done()
        answer = self._ask(_request(work, self._shared)) if self.alive else None
        if answer is None:
            if self._stopped:
                raise InterruptedError
            return work.done()
        if "not_finite" in answer:
            raise NonFiniteWeightError(answer["not_finite"])
        found = {name: tensor.clone() for name, tensor in self._shared.read(answer["tensors"]).items()}
        factors = {each: found[f"factors:{place}"] for place, each in enumerate(work.seen)}
        rounded = {
            name: PackedWeight(*(found.get(f"{part}:{name}") for part in _PARTS))  # type: ignore[arg-type]
            for name in work.weights
        }
        return factors, rounded

    def _ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a request; None where the process has gone."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except OSError:
            return None
        return json.loads(line) if line.endswith(b"\n") else None


@contextmanager
def helpers(count: int) -> Iterator[list[Helper]]:
    """This many processes. They take two seconds to be ready, so that it pays to start them early."""
    with ExitStack() as processes:
        yield [processes.enter_context(Helper()) for _ in range(count)]


def _request(work: LayerWork, shared: SharedTensors) -> dict[str, Any]:
    tensors = {f"weight:{name}": weight for name, weight in work.weights.items()}
    runs = []
    for place, seen in enumerate(work.seen.values()):
        tensors |= {f"{place}:squares": seen.squares, f"{place}:sample": seen.sample}
        products = seen.products
        tensors |= {f"{place}:{run}": each for run, each in enumerate(products)}
        runs.append(len(products))
    return {
        "tensors": shared.write(tensors),
        "inputs": [asdict(found) for found in work.seen],
        "runs": runs,
        "formats": {name: asdict(fmt) for name, fmt in work.formats.items()},
        "rounds_inputs": work.rounds_inputs,
    }


def _work(request: Mapping[str, Any], shared: SharedTensors) -> LayerWork:
    tensors = shared.read(request["tensors"])
    inputs = [FoldedInput(**{**each, "readers": tuple(each["readers"])}) for each in request["inputs"]]
    seen = {
        found: _Given(
            tensors[f"{place}:squares"],
            tensors[f"{place}:sample"],
            [tensors[f"{place}:{run}"] for run in range(runs)],
        )
        for place, (found, runs) in enumerate(zip(inputs, request["runs"], strict=True))
    }
    formats = {name: BlockFormat(**fmt) for name, fmt in request["formats"].items()}
    weights = {name: tensors[f"weight:{name}"] for name in formats}
    return LayerWork(seen, weights, formats, request["rounds_inputs"])


def answer(request: Mapping[str, Any], shared: SharedTensors) -> dict[str, Any]:
    """Do what is asked for and put the result in its place."""
    try:
        factors, rounded = _work(request, shared).done()
    except NonFiniteWeightError as error:
        return {"not_finite": str(error)}
    tensors = {f"factors:{place}": each for place, each in enumerate(factors.values())}
    for name, packed in rounded.items():
        parts = ((part, getattr(packed, part)) for part in _PARTS)
        tensors |= {f"{part}:{name}": tensor for part, tensor in parts if tensor is not None}
    return {"tensors": shared.write(tensors)}


def main(descriptor: int) -> None:
    """Answer requests until there are no more: the other side has closed the pipe, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the one that has started this ends it
    keep_freed_memory()
    torch.set_num_threads(1)
    shared = SharedTensors(descriptor)
    with torch.no_grad():
        for line in sys.stdin.buffer:
            sys.stdout.buffer.write(json.dumps(answer(json.loads(line), shared)).encode() + b"\n")
            sys.stdout.buffer.flush()
