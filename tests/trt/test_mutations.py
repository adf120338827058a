"""If these fail, the emulated device lets a mistake of our session pass, and its other tests show less.

Each rule is broken by one small change to our code, of the kind that a refactoring could make.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrun.backends.opening import open_session
from qrun.backends.trt.cache import TrtKVCache
from qrun.backends.trt.context import ProfileContext, StagedTensor
from qrun.backends.trt.cuda import DeviceBuffer, Graph, HostBuffer, Stream, call
from qrun.backends.trt.engine import Engine
from tests.emulated.device import EmulatedDevice, use
from tests.emulated.plans import install
from tests.emulated.rules import Rule, Violation

Mutation = Callable[[pytest.MonkeyPatch], None]
MUTATIONS: dict[Rule, Mutation] = {}


def breaks(rule: Rule) -> Callable[[Mutation], Mutation]:
    def remember(mutation: Mutation) -> Mutation:
        MUTATIONS[rule] = mutation
        return mutation

    return remember


def after(patch: pytest.MonkeyPatch, owner: type, name: str, then: Callable[..., None]) -> None:
    """Let a method do its work, and something else after it."""
    real = getattr(owner, name)

    def method(self: Any, *arguments: Any) -> Any:
        result = real(self, *arguments)
        then(self, *arguments)
        return result

    patch.setattr(owner, name, method)


@breaks(Rule.DEFAULT_STREAM)
def the_default_stream(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "handle", 0)


@breaks(Rule.PAGEABLE)
def an_ordinary_array_in_place_of_a_page_locked_one(patch: pytest.MonkeyPatch) -> None:
    ordinary = ctypes.create_string_buffer(1 << 16)
    patch.setattr(HostBuffer, "address", ctypes.addressof(ordinary))


@breaks(Rule.OUT_OF_BOUNDS)
def zeros_beyond_the_buffer(patch: pytest.MonkeyPatch) -> None:
    after(patch, DeviceBuffer, "__init__", lambda buffer, nbytes: setattr(buffer, "nbytes", nbytes + 1))


@breaks(Rule.NEVER_ALLOCATED)
def addresses_of_nothing(patch: pytest.MonkeyPatch) -> None:
    real = ProfileContext._set_address
    patch.setattr(ProfileContext, "_set_address", lambda self, name, address: real(self, name, 4096))


@breaks(Rule.USE_AFTER_FREE)
def one_layers_keys_freed_too_early(patch: pytest.MonkeyPatch) -> None:
    def free(cache: TrtKVCache, _: int) -> None:
        cache._stream.synchronize()
        call("cudaFree", next(iter(cache.buffers.values())).address)

    after(patch, TrtKVCache, "reserve", free)


@breaks(Rule.DOUBLE_FREE)
def a_close_that_does_not_remember(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceBuffer, "close", lambda buffer: [call("cudaFree", buffer.address) for _ in range(2)])


@breaks(Rule.FREED_IN_FLIGHT)
def logits_freed_before_they_are_copied(patch: pytest.MonkeyPatch) -> None:
    after(patch, StagedTensor, "download", lambda tensor, *_: tensor._device.close())


@breaks(Rule.UNINITIALISED)
def a_cache_without_zeros(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "zero", lambda *_: None)


@breaks(Rule.HOST_CHANGED)
def no_wait_between_two_pieces_of_a_prompt(patch: pytest.MonkeyPatch) -> None:
    real, waits = Stream.synchronize, iter(range(100))
    first_piece = 2  # after one wait for each context that is made
    patch.setattr(Stream, "synchronize", lambda self: None if next(waits) == first_piece else real(self))


@breaks(Rule.UNSYNCHRONISED)
def no_wait_at_all(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Stream, "synchronize", lambda _: None)


@breaks(Rule.DEAD_HANDLE)
def a_graph_destroyed_after_its_first_launch(patch: pytest.MonkeyPatch) -> None:
    after(patch, Graph, "launch", lambda graph, _: call("cudaGraphExecDestroy", graph._handle))


@breaks(Rule.PROFILE_UNSET)
def a_context_without_a_profile(patch: pytest.MonkeyPatch) -> None:
    from tests.emulated.tensorrt_rtx import IExecutionContext

    patch.setattr(Engine, "new_context", lambda self, *_: IExecutionContext._of(self._engine))


@breaks(Rule.OUTSIDE_PROFILE)
def one_token_more_than_the_profile_allows(patch: pytest.MonkeyPatch) -> None:
    def add_one(self: ProfileContext, *_: Any) -> None:
        self.most_tokens += 1

    real = ProfileContext.__init__

    def init(self: ProfileContext, *arguments: Any, **options: Any) -> None:
        real(self, *arguments, **options)
        add_one(self)

    patch.setattr(ProfileContext, "__init__", init)


@breaks(Rule.SHAPE_UNSET)
def shapes_neither_set_nor_asked_for(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ProfileContext, "_set_shapes", lambda self, *shape: setattr(self, "_shape", shape))


@breaks(Rule.ADDRESS_UNSET)
def one_address_forgotten(patch: pytest.MonkeyPatch) -> None:
    real = ProfileContext._set_address
    patch.setattr(
        ProfileContext, "_set_address", lambda self, *where: where[0] == "position_ids" or real(self, *where)
    )


@breaks(Rule.TOO_SMALL)
def one_byte_an_element(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Engine, "item_size", lambda *_: 1)


@breaks(Rule.UNALIASED)
def present_elsewhere_than_past(patch: pytest.MonkeyPatch) -> None:
    def misplace(self: ProfileContext, cache: TrtKVCache) -> None:
        self._set_address("present.1.key", cache.buffers["past_key_values.2.key"].address)

    after(patch, ProfileContext, "_bind", misplace)


@breaks(Rule.CAPTURE_COLD)
def a_capture_before_the_first_run(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ProfileContext, "_capturable", lambda _: True)


@breaks(Rule.CAPTURE_FORBIDDEN)
def a_wait_inside_what_is_captured(patch: pytest.MonkeyPatch) -> None:
    after(patch, ProfileContext, "_enqueue", lambda self: self._stream.synchronize())


@breaks(Rule.CONTEXT_GONE)
def a_context_dropped_while_it_works(patch: pytest.MonkeyPatch) -> None:
    after(patch, ProfileContext, "_enqueue", lambda self: self._drop_context())


@breaks(Rule.ENGINE_GONE)
def contexts_not_dropped_before_the_engine(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ProfileContext, "_drop_context", lambda _: None)


@breaks(Rule.LEAK)
def buffers_not_given_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceBuffer, "close", lambda _: None)


@pytest.fixture
def lenient(monkeypatch: pytest.MonkeyPatch) -> Iterator[EmulatedDevice]:
    """A device whose broken rules are looked at by the test itself."""
    device = EmulatedDevice()
    install(device, monkeypatch)
    yield device
    use(None)


def use_a_plan(plan: Path, device: EmulatedDevice) -> None:
    """A prompt in two pieces, six decode steps, a trim, and the end."""
    ids = np.random.default_rng(0).integers(0, 256, (1, 30))
    with open_session(plan) as session:
        cache = session.new_cache()
        device.check_readable(session.forward(ids[:, :20], cache))
        for step in range(20, 26):
            device.check_readable(session.forward(ids[:, step : step + 1], cache))
        cache.trim(12)
        device.check_readable(session.forward(ids[:, 12:30], cache))
    del cache, session
    device.check_nothing_left()


def test_without_a_mutation_no_rule_is_broken(plan: Path, lenient: EmulatedDevice) -> None:
    use_a_plan(plan, lenient)
    assert lenient.violations == []
    assert lenient.graph_launches == 5


# Weak references report from where nobody can catch it; the device has written it down.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("rule", Rule, ids=lambda rule: rule.name)
def test_every_rule_bites(
    rule: Rule, plan: Path, lenient: EmulatedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        MUTATIONS[rule](patch)
        with suppress(Violation):
            use_a_plan(plan, lenient)
    assert [violation.rule for violation in lenient.violations[:1]] == [rule]
