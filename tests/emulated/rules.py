"""What the emulated device does not let pass. ``tests/trt/test_mutations.py`` shows each biting."""

from __future__ import annotations

from enum import Enum


class Rule(Enum):
    """A mistake that a real GPU would answer with wrong numbers, a crash, or nothing at all."""

    DEFAULT_STREAM = "work on the default stream"
    PAGEABLE = "an asynchronous copy from or to memory that is not page-locked"
    OUT_OF_BOUNDS = "a copy or fill beyond the memory that was allocated"
    NEVER_ALLOCATED = "an address that nobody allocated"
    USE_AFTER_FREE = "memory that was freed before"
    DOUBLE_FREE = "memory that is freed twice"
    FREED_IN_FLIGHT = "memory freed while work that uses it is queued"
    UNINITIALISED = "memory read that was never written"
    HOST_CHANGED = "the host wrote into an array that was still to be copied"
    UNSYNCHRONISED = "a result read before its stream was synchronised"
    DEAD_HANDLE = "a stream, event or graph that was destroyed, or never made"
    PROFILE_UNSET = "no optimisation profile selected"
    OUTSIDE_PROFILE = "a shape outside the optimisation profile"
    SHAPE_UNSET = "an input without a shape"
    ADDRESS_UNSET = "a tensor without an address"
    TOO_SMALL = "a buffer smaller than its tensor"
    UNALIASED = "past and present of the KV cache at two addresses"
    CAPTURE_COLD = "a capture before the first run with these shapes"
    CAPTURE_FORBIDDEN = "an allocation, a release or a wait in the middle of a capture"
    CONTEXT_GONE = "work of an execution context that is gone"
    ENGINE_GONE = "an execution context that outlived its engine"
    LEAK = "something not given back at the end"


class Violation(Exception):
    """A rule was broken by our code; never a ``QrunError``, since no user can mend it."""

    def __init__(self, rule: Rule, detail: str) -> None:
        super().__init__(f"{rule.name}: {rule.value} ({detail})")
        self.rule = rule
