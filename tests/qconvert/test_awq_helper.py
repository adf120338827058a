"""Layers that another process rounds: the same bits, and nothing is lost with it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch

from qconvert import export as export_module
from qconvert.calibration import awq
from qconvert.calibration import helper as helper_module
from qconvert.calibration.awq import balance_and_round, helpers_worth
from qconvert.calibration.gptq.store import RoundedWeights
from qconvert.calibration.helper import Helper, SharedTensors, helpers
from qconvert.checkpoint.load import load_model, open_checkpoint
from qconvert.errors import QconvertError
from qconvert.export import ExportOptions, export
from qconvert.formats.recipe import BlockFormat, Recipe
from qconvert.progress import Progress
from tests.qconvert.test_awq import RECIPE, balanced
from tests.tiny import make_tiny_checkpoint

SEQUENCES = [[*range(start, start + 48)] for start in range(4)]
# Some matrices in 8 bits, which are not solved, and blocks with and without zero points.
MIXED = Recipe(
    "int4",
    "bfloat16",
    BlockFormat(4, 32, symmetric=True, scale_dtype="bfloat16"),
    None,
    exceptions={"down_proj": BlockFormat(8, 32, symmetric=True, scale_dtype="bfloat16")},
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("helper") / "c"
    return make_tiny_checkpoint(folder, intermediate_size=288, dtype="bfloat16")


@pytest.fixture
def model(checkpoint: Path):
    return load_model(open_checkpoint(checkpoint))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Helper]:
    """Every helper that is made."""
    made: list[Helper] = []
    before = Helper.__enter__

    def enter(self: Helper) -> Helper:
        made.append(before(self))
        return made[-1]

    monkeypatch.setattr(Helper, "__enter__", enter)
    return made


def same(ours, theirs) -> bool:
    factors, rounded = ours
    assert list(factors) == list(theirs[0])
    assert sorted(rounded) == sorted(theirs[1])
    parts = [
        (getattr(packed, part), getattr(theirs[1][name], part))
        for name, packed in rounded.items()
        for part in ("data", "scales", "zero_points")
    ]
    return all(torch.equal(factor, theirs[0][found]) for found, factor in factors.items()) and all(
        left is right is None or torch.equal(left, right) for left, right in parts
    )


@pytest.mark.parametrize("recipe", [RECIPE, MIXED], ids=["4 bits", "mixed"])
def test_two_processes_round_to_the_same_bits_as_one(model, recipe, started, monkeypatch) -> None:
    alone = balanced(model, SEQUENCES, recipe)
    # Nothing is rounded in this process, so that nothing but the other one is tested.
    asked = []
    monkeypatch.setattr("qconvert.calibration.balance.LayerWork.done", None)
    monkeypatch.setattr("qconvert.calibration.walk.engines_of", lambda others: [each.done for each in others])
    before = Helper._ask
    monkeypatch.setattr(Helper, "_ask", lambda self, given: asked.append(1) or before(self, given))
    assert same(balanced(model, SEQUENCES, recipe, processes=1), alone)
    assert len(asked) == model.config.num_hidden_layers
    assert not any(helper.alive for helper in started)


def test_a_helper_that_is_killed_loses_nothing(model, started, monkeypatch) -> None:
    alone = balanced(model, SEQUENCES)
    before = Helper._ask

    def killed(self: Helper, request):
        self._process.kill()
        return before(self, request)

    monkeypatch.setattr(Helper, "_ask", killed)
    assert same(balanced(model, SEQUENCES, processes=2), alone)
    assert len(started) == 2


@pytest.mark.parametrize("missing", ["memfd_create", "an interpreter"])
def test_without_other_processes_this_one_does_all(model, missing: str, started, monkeypatch) -> None:
    alone = balanced(model, SEQUENCES)
    if missing == "memfd_create":
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(helper_module.sys, "executable", "/nowhere/python")
    assert same(balanced(model, SEQUENCES, processes=1), alone)
    assert not started[0].alive


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_a_weight_that_is_not_finite_is_named_by_whoever_finds_it(
    checkpoint, tmp_path, layer, started
) -> None:
    model = load_model(open_checkpoint(checkpoint))
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    model.get_parameter(name).data = model.get_parameter(name).detach().clone()
    model.get_parameter(name).data[3, 5] = float("nan")
    store = RoundedWeights(tmp_path / "out", {}, RECIPE)
    with (
        helpers(1) as others,
        pytest.raises(QconvertError, match=f"layers.{layer}.mlp.down_proj.weight holds NaN or Inf"),
    ):
        balance_and_round(model, RECIPE, SEQUENCES, store, progress=Progress(quiet=True), helpers=others)
    assert not any(helper.alive for helper in started)


def test_no_process_is_left_when_the_caller_breaks_off(model, tmp_path, started, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store = RoundedWeights(tmp_path / "out", {}, RECIPE)
    monkeypatch.setattr(RoundedWeights, "add_layer", full)
    with helpers(2) as others, pytest.raises(OSError, match="No space"):
        balance_and_round(model, RECIPE, SEQUENCES, store, progress=Progress(quiet=True), helpers=others)
    assert not any(helper.alive for helper in started)
    assert none_left()


def none_left() -> bool:
    return not [child for child in psutil.Process().children() if "helper" in " ".join(child.cmdline())]


def test_the_memory_that_both_have_is_given_back_after_the_last_layer(model, tmp_path) -> None:
    def shared() -> int:
        maps = Path("/proc/self/maps").read_text().splitlines()
        return sum("memfd:qconvert" in each for each in maps) + len(
            [each for each in others if is_open(each)]
        )

    store = RoundedWeights(tmp_path / "out", {}, RECIPE)

    def is_open(helper: Helper) -> bool:
        return hasattr(helper, "_descriptor")

    with helpers(2) as others:
        assert shared() == 2
        balance_and_round(model, RECIPE, SEQUENCES, store, progress=Progress(quiet=True), helpers=others)
        assert shared() == 0
        assert none_left()


def test_each_further_core_gets_a_process_where_the_model_is_worth_it(monkeypatch) -> None:
    monkeypatch.setattr(awq, "usable_cores", lambda: 4)
    assert [helpers_worth(parameters) for parameters in (1_000_000, 494_000_000)] == [0, 3]
    monkeypatch.setattr(awq, "usable_cores", lambda: 1)
    assert helpers_worth(494_000_000) == 0


@pytest.mark.parametrize("calibrated", [True, False])
def test_an_export_starts_them_where_it_calibrates_and_leaves_none(
    checkpoint, tmp_path, started, monkeypatch, calibrated: bool
) -> None:
    monkeypatch.setattr(awq, "_WORTH_A_PROCESS", 0)
    monkeypatch.setattr(awq, "usable_cores", lambda: 2)
    recipe = "awq" if calibrated else "rtn"
    options = ExportOptions(output=tmp_path / "m", precision="int4", recipe=recipe, verify=False)
    export(str(checkpoint), options, Progress(quiet=True))
    assert len(started) == int(calibrated)
    assert none_left()


def test_a_checkpoint_that_cannot_be_loaded_leaves_no_process(
    checkpoint, tmp_path, started, monkeypatch
) -> None:
    def broken(_: object) -> None:
        assert started[0].alive
        raise QconvertError("broken")

    monkeypatch.setattr(awq, "_WORTH_A_PROCESS", 0)
    monkeypatch.setattr(awq, "usable_cores", lambda: 2)
    monkeypatch.setattr(export_module, "load_model", broken)
    options = ExportOptions(output=tmp_path / "m", precision="int4", verify=False)
    with pytest.raises(QconvertError, match="broken"):
        export(str(checkpoint), options, Progress(quiet=True))
    assert none_left()


def test_shared_tensors_of_every_type_come_back(tmp_path: Path) -> None:
    descriptor = os.memfd_create("test")
    tensors = {
        "halves": torch.arange(7, dtype=torch.bfloat16),
        "bytes": torch.arange(5, dtype=torch.uint8).view(1, 5),
        "none": torch.empty(0, 3),
        "float": torch.randn(3, 2, 2),
    }
    ours, theirs = SharedTensors(descriptor), SharedTensors(descriptor)
    for each in (tensors, {"larger": torch.randn(900, 40)}, tensors):
        found = theirs.read(ours.write(each))
        assert all(torch.equal(found[name], tensor) for name, tensor in each.items())
        assert [found[name].dtype for name in each] == [tensor.dtype for tensor in each.values()]
    os.close(descriptor)
