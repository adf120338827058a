"""The emulated GPU's state: memory, streams whose work waits until somebody waits for it, and graphs."""

from __future__ import annotations

import ctypes
import functools
import weakref
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from tests.emulated.rules import Rule, Violation

# Device addresses lie where no process has memory: whoever reads them in Python does not get far.
_FIRST_ADDRESS = 0xD000_0000_0000
_ALIGNMENT = 256
# What memory holds before it is written, and a result before it is there: NaN in every float type.
POISON = 0xFF


class Allocation:
    """Memory of the device or page-locked memory of the host; kept after its release, to tell who uses it."""

    def __init__(self, base: int, data: NDArray[np.uint8], *, on_host: bool) -> None:
        self.base = base
        self.data = data
        self.written = np.zeros(len(data), dtype=bool)
        self.on_host = on_host
        self.freed = False

    def __str__(self) -> str:
        return f"{len(self.data)} bytes of {'host' if self.on_host else 'device'} memory at {self.base:#x}"


class Piece:
    """``nbytes`` at an address."""

    def __init__(self, allocation: Allocation, offset: int, nbytes: int) -> None:
        self.allocation = allocation
        self._range = slice(offset, offset + nbytes)

    @property
    def bytes(self) -> NDArray[np.uint8]:
        return self.allocation.data[self._range]

    @property
    def written(self) -> NDArray[np.bool_]:
        return self.allocation.written[self._range]


class Work:
    """One thing on a stream: done when the stream is waited for, and not before."""

    def __init__(self, uses: list[Piece]) -> None:
        self.uses = uses

    def on_enqueue(self) -> None:
        """What happens at once when it is queued, alone or as part of a graph."""

    def run(self, device: EmulatedDevice) -> None:
        raise NotImplementedError


class Copy(Work):
    def __init__(self, target: Piece, source: Piece) -> None:
        super().__init__([target, source])
        self._target = target
        self._source = source
        self._sent: NDArray[np.uint8] = source.bytes.copy()

    def on_enqueue(self) -> None:
        self._sent = self._source.bytes.copy()
        if self._target.allocation.on_host:
            self._target.bytes[...] = POISON

    def run(self, device: EmulatedDevice) -> None:
        source = self._source
        if source.allocation.on_host and not np.array_equal(source.bytes, self._sent):
            device.fail(Rule.HOST_CHANGED, str(source.allocation))
        if not source.allocation.on_host and not source.written.all():
            device.fail(Rule.UNINITIALISED, str(source.allocation))
        self._target.bytes[...] = source.bytes
        self._target.written[...] = True


class Fill(Work):
    def __init__(self, target: Piece, value: int) -> None:
        super().__init__([target])
        self._target = target
        self._value = value

    def run(self, device: EmulatedDevice) -> None:
        self._target.bytes[...] = self._value
        self._target.written[...] = True


class EmulatedStream:
    def __init__(self) -> None:
        self.queue: list[Work] = []
        self.capture: list[Work] | None = None


class EmulatedDevice:
    """One GPU of compute capability 8.9.

    Attributes:
        total_bytes: of memory; an allocation beyond it fails as CUDA's does.
        no_gpu: the CUDA error of a machine without one, by its name, or None.
        capturable: what TensorRT answers when it is asked whether a stream may be captured.
        breaks_captures: a capture ends with an error, as if something in it were not allowed.
        refuses_runs: TensorRT returns False from the next runs, with this in its log.
        violations: every broken rule, also those that were swallowed on their way.
        calls: for each function of the doubles, the types of the arguments that it was given.
    """

    def __init__(self, *, total_bytes: int = 8 << 30) -> None:
        self.name = "Emulated GPU"
        self.compute_capability = (8, 9)
        self.total_bytes = total_bytes
        self.no_gpu: str | None = None
        self.capturable = True
        self.breaks_captures = False
        self.refuses_runs: str | None = None
        self.violations: list[Violation] = []
        self.calls: dict[str, set[tuple[type, ...]]] = {}
        self.runs = 0
        self.graph_launches = 0
        self.handles: dict[int, Any] = {}
        self.held: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._allocations: dict[int, Allocation] = {}
        self._bases: list[int] = []
        self._next_address = _FIRST_ADDRESS
        self._next_handle = 0x1000

    # Mistakes.

    def fail(self, rule: Rule, detail: str) -> NoReturn:
        violation = Violation(rule, detail)
        self.violations.append(violation)
        raise violation

    def check_readable(self, array: NDArray[Any]) -> None:
        """Hold a result against the rule that its stream must have been synchronised."""
        start = array.__array_interface__["data"][0]
        for stream in self._alive(EmulatedStream):
            for piece in (piece for work in stream.queue for piece in work.uses):
                base = piece.allocation.base
                if (
                    piece.allocation.on_host
                    and base < start + array.nbytes
                    and start < base + len(piece.bytes)
                ):
                    self.fail(Rule.UNSYNCHRONISED, "its copy is still queued")
        raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1, array.itemsize)
        if (raw == POISON).all(axis=1).any():
            self.fail(Rule.UNSYNCHRONISED, "it holds what was there before the copy")

    def check_nothing_left(self) -> None:
        """Hold the end of a session against the rule that everything is given back."""
        left = [str(each) for each in self._allocations.values() if not each.freed]
        left += [type(each).__name__ for each in (*self.handles.values(), *self.held)]
        if left:
            self.fail(Rule.LEAK, f"{len(left)}: {', '.join(left[:3])}")

    # Memory.

    def free_bytes(self) -> int:
        return self.total_bytes - self.used_bytes()

    def used_bytes(self) -> int:
        buffers = [a for a in self._allocations.values() if not a.freed and not a.on_host]
        return sum(len(each.data) for each in buffers) + sum(self.held.values())

    def allocate(self, nbytes: int) -> int:
        """The address of new device memory; the caller has seen that there is enough."""
        self._outside_capture("an allocation")
        base = self._next_address
        # A gap between two allocations: a step too far falls into it.
        self._next_address += (nbytes // _ALIGNMENT + 2) * _ALIGNMENT
        self._add(Allocation(base, np.full(nbytes, POISON, dtype=np.uint8), on_host=False))
        return base

    def allocate_host(self, nbytes: int) -> int:
        self._outside_capture("an allocation")
        memory = (ctypes.c_ubyte * nbytes)()
        data = np.frombuffer(memory, dtype=np.uint8)
        data[...] = POISON
        self._add(Allocation(ctypes.addressof(memory), data, on_host=True))
        return ctypes.addressof(memory)

    def release(self, address: int) -> None:
        self._outside_capture("a release")
        allocation = self._allocations.get(address)
        if allocation is None:
            self.fail(Rule.NEVER_ALLOCATED, f"freeing {address:#x}")
        if allocation.freed:
            self.fail(Rule.DOUBLE_FREE, str(allocation))
        for stream in self._alive(EmulatedStream):
            if any(piece.allocation is allocation for work in stream.queue for piece in work.uses):
                self.fail(Rule.FREED_IN_FLIGHT, str(allocation))
        allocation.freed = True

    def piece(self, address: int, nbytes: int, *, too_short: Rule = Rule.OUT_OF_BOUNDS) -> Piece:
        """Memory that is there and long enough, or a violation."""
        index = bisect_right(self._bases, address) - 1
        allocation = self._allocations[self._bases[index]] if index >= 0 else None
        if allocation is None or address >= allocation.base + len(allocation.data):
            self.fail(Rule.NEVER_ALLOCATED, f"{address:#x}")
        if allocation.freed:
            self.fail(Rule.USE_AFTER_FREE, str(allocation))
        offset = address - allocation.base
        if offset + nbytes > len(allocation.data):
            self.fail(too_short, f"{nbytes} bytes at offset {offset} of {allocation}")
        return Piece(allocation, offset, nbytes)

    def host_piece(self, address: int, nbytes: int) -> Piece:
        """Page-locked memory: an address that the device does not know is anybody's."""
        index = bisect_right(self._bases, address) - 1
        allocation = self._allocations[self._bases[index]] if index >= 0 else None
        if allocation is None or not allocation.on_host or address >= allocation.base + len(allocation.data):
            self.fail(Rule.PAGEABLE, f"{nbytes} bytes at {address:#x}")
        return self.piece(address, nbytes)

    def _add(self, allocation: Allocation) -> None:
        self._allocations[allocation.base] = allocation
        self._bases = sorted(self._allocations)

    # Work.

    def add_handle(self, thing: Any) -> int:
        self._next_handle += 0x10
        self.handles[self._next_handle] = thing
        return self._next_handle

    def handle(self, handle: Any, kind: type) -> Any:
        thing = self.handles.get(int(handle))
        if not isinstance(thing, kind):
            self.fail(Rule.DEAD_HANDLE, f"{kind.__name__} {int(handle):#x}")
        return thing

    def stream(self, handle: Any) -> EmulatedStream:
        if int(handle) == 0:
            self.fail(Rule.DEFAULT_STREAM, "stream 0")
        found: EmulatedStream = self.handle(handle, EmulatedStream)
        return found

    def enqueue(self, stream: EmulatedStream, work: Work) -> None:
        if stream.capture is not None:
            stream.capture.append(work)
            return
        work.on_enqueue()
        stream.queue.append(work)

    def synchronize(self, stream: EmulatedStream) -> None:
        if stream.capture is not None:
            self.fail(Rule.CAPTURE_FORBIDDEN, "a wait")
        queue, stream.queue = stream.queue, []
        for work in queue:
            for piece in work.uses:
                if piece.allocation.freed:
                    self.fail(Rule.USE_AFTER_FREE, str(piece.allocation))
            work.run(self)

    def _outside_capture(self, what: str) -> None:
        if any(stream.capture is not None for stream in self._alive(EmulatedStream)):
            self.fail(Rule.CAPTURE_FORBIDDEN, what)

    def _alive(self, kind: type) -> list[Any]:
        return [thing for thing in self.handles.values() if isinstance(thing, kind)]


_current: EmulatedDevice | None = None


def current() -> EmulatedDevice:
    assert _current is not None
    return _current


def use(device: EmulatedDevice | None) -> None:
    """The device that the doubles work on from now on."""
    global _current  # noqa: PLW0603 - a machine has one GPU, and modules have no constructor
    _current = device


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Notes the types of a call's arguments, for the comparison with the real module's signatures."""
    method = "." in function.__qualname__

    @functools.wraps(function)
    def record(*arguments: Any) -> Any:
        types = tuple(type(each) for each in arguments[1 if method else 0 :])
        current().calls.setdefault(function.__qualname__, set()).add(types)
        return function(*arguments)

    return record
