"""The head in halves is rounded on the text: if these fail, the first of two steps errs as by rounding."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from qconvert.calibration import coarse
from qconvert.calibration.coarse import ROOM, principal_directions, round_head
from qconvert.calibration.gptq.store import HEAD, RoundedWeights
from qconvert.export import ExportOptions, export
from qconvert.formats import shortlist
from qconvert.formats.blocks import pack
from qconvert.formats.layout import NonFiniteWeightError, PackedWeight
from qconvert.formats.recipe import BlockFormat, Recipe
from qconvert.formats.record import RECORD_NAME
from qconvert.progress import Progress
from tests.qconvert.mutants import Exporter, overwrite, stored_at
from tests.tiny import make_tiny_checkpoint

COLUMNS = 192
FMT = BlockFormat(8, 64, symmetric=True, scale_dtype="bfloat16", halves=True)
QUIET = Progress(quiet=True)


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of one kind, ``[tokens, COLUMNS]`` with few strong directions: to round on, and to look at."""
    generator = torch.Generator().manual_seed(3)
    mixed = torch.randn(COLUMNS, COLUMNS, generator=generator) * 0.9 ** torch.arange(COLUMNS)
    first, second = (torch.randn(2048, COLUMNS, generator=generator) @ mixed.T for _ in range(2))
    return first, second


def matrix(rows: int = 500) -> torch.Tensor:
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(4)) * 0.05


def products(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs / len(inputs)


def scales(packed: PackedWeight) -> torch.Tensor:
    return packed.scales.float().repeat_interleave(FMT.block_size, 1)


def coarse_error(packed: PackedWeight, weight: torch.Tensor, inputs: torch.Tensor) -> float:
    """Root mean square of what a product with the upper halves alone misses."""
    upper = ((packed.data.flatten(1) + 8) >> 4).float()
    missing = weight - (upper - 8) * 16 * scales(packed)
    return float((inputs @ missing.T).square().mean().sqrt())


def test_upper_halves_err_less_on_another_text() -> None:
    known, other = texts()
    weight = matrix()
    ours, nearest = round_head(weight, FMT, products(known)), pack(weight, FMT)
    assert coarse_error(ours, weight, other) < 0.7 * coarse_error(nearest, weight, other)


def test_a_code_moves_only_over_a_border_and_by_few_steps() -> None:
    weight = matrix()
    ours, nearest = round_head(weight, FMT, products(texts()[0])), pack(weight, FMT)
    assert torch.equal(ours.scales, nearest.scales)
    moved = ours.data.flatten(1).int() - nearest.data.flatten(1).int()
    assert 0.02 < float((moved != 0).float().mean()) < 0.25
    steps = weight / scales(ours) - (ours.data.flatten(1).float() - 128)
    assert float(steps.abs().max()) <= ROOM + 0.01
    upper = [(each.data.flatten(1).int() + 8) >> 4 for each in (ours, nearest)]
    assert torch.all(((upper[0] - upper[1]).abs() == 1) == (moved != 0))
    assert int(ours.data.max()) <= 128 + 119


def test_codes_at_the_ends_stay_in_their_range() -> None:
    """Rows of few values, so that the first and the last upper half occur."""
    weight = matrix().sign() * torch.linspace(0.5, 1.0, 500)[:, None]
    ours = round_head(weight, FMT, products(texts()[0]))
    steps = weight / scales(ours) - (ours.data.flatten(1).float() - 128)
    assert float(steps.abs().max()) <= ROOM + 0.01


def test_how_many_threads_there_are_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coarse, "_ROWS", 100)
    weight, known = matrix(), products(texts()[0])
    torch.set_num_threads(1)
    with ThreadPoolExecutor(3) as three:
        assert torch.equal(round_head(weight, FMT, known).data, round_head(weight, FMT, known, three).data)


def test_directions_are_those_of_the_largest_products() -> None:
    known = products(texts()[0])
    sizes, vectors = torch.linalg.eigh(known)
    best = vectors[:, -32:] * sizes[-32:].sqrt()
    found = principal_directions(known)
    assert found.shape == best.shape
    torch.testing.assert_close(found @ found.T, best @ best.T, atol=2e-3 * float(sizes[-1]), rtol=0)


@pytest.mark.parametrize("where", ["weight", "products"])
def test_what_is_not_finite_is_refused(where: str) -> None:
    weight, known = matrix(), products(texts()[0])
    (weight if where == "weight" else known)[3, 5] = torch.nan
    with pytest.raises(NonFiniteWeightError):
        round_head(weight, FMT, known)


def test_the_store_keeps_a_head_beside_the_layers(tmp_path: Path) -> None:
    store = RoundedWeights(tmp_path / "out", {}, Recipe("int4", "float32", None, FMT))
    name, packed = "lm_head.weight", pack(matrix(), FMT)
    assert store.layer(HEAD) is None
    assert name not in store
    store.add_layer(HEAD, {name: packed})
    assert name in store
    assert "model.embed_tokens.weight" not in store
    assert torch.equal(store[name].data, packed.data)
    store.remove()
    assert not store.folder.exists()


@pytest.fixture
def short_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shortlist, "SIZE", 16)
    monkeypatch.setattr("qconvert.recipes.choose._GPTQ_SHORTLIST", 16)


@pytest.mark.usefixtures("short_vocabulary")
@pytest.mark.parametrize("recipe", ["awq", "gptq"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_is_proven_with_such_a_head(tmp_path: Path, recipe: str, tied: bool) -> None:
    source = make_tiny_checkpoint(tmp_path / "c", tie_word_embeddings=tied)
    chosen = ExportOptions("int4", recipe=recipe, output=tmp_path / "m", prefill=True, int8_kv_cache=True)
    exported = export(str(source), chosen, QUIET)
    assert exported.report is not None
    assert exported.report.passed
    recorded = json.loads((exported.folder / RECORD_NAME).read_text())["float32_sha256"]
    assert ("model.embed_tokens.weight" in recorded, "lm_head.weight" in recorded) == (tied, not tied)
    assert {path.name for path in tmp_path.iterdir()} == {"c", "m"}


@pytest.mark.usefixtures("short_vocabulary")
@pytest.mark.parametrize("recipe", ["awq", "gptq"])
def test_another_code_than_was_recorded_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """One step of 8 bits: less than the text itself may move a code."""
    exporter = Exporter(make_tiny_checkpoint(tmp_path / "c"), tmp_path, monkeypatch)
    folder = exporter.export("int4", recipe=recipe)
    assert exporter.verify(folder).passed
    name = "model.embed_tokens.weight"
    data, offset, _ = stored_at(folder, f"{name}.lower")
    overwrite(folder, f"{name}.lower", 40, bytes([data.read_bytes()[offset + 40] ^ 1]))
    report = exporter.verify(folder)
    assert [fault.tensor for fault in report.weights.faults] == [name]
    assert "not the weights that the calibration has rounded" in report.weights.faults[0].what


@pytest.mark.usefixtures("short_vocabulary")
def test_a_head_of_other_scales_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would record what it has done; the checkpoint tells."""

    def longer(weight: torch.Tensor, fmt: BlockFormat, *others: object) -> PackedWeight:
        return pack(weight.float() * 1.1, fmt)

    monkeypatch.setattr(coarse, "round_head", longer)
    exporter = Exporter(make_tiny_checkpoint(tmp_path / "c"), tmp_path, monkeypatch)
    report = exporter.verify(exporter.export("int4"))
    assert "model.embed_tokens.weight" in {fault.tensor for fault in report.weights.faults}


@pytest.mark.usefixtures("short_vocabulary")
@pytest.mark.parametrize("guilty", ["model.norm.weight", "model.embed_tokens.weight"])
def test_what_makes_the_head_infinite_is_named(tmp_path: Path, guilty: str) -> None:
    from safetensors.torch import load_file, save_file

    from qconvert.errors import QconvertError

    source = make_tiny_checkpoint(tmp_path / "c")
    tensors = load_file(source / "model.safetensors")
    tensors[guilty].view(-1)[-1] = torch.nan
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(QconvertError, match="NaN or Inf"):
        export(str(source), ExportOptions("int4", output=tmp_path / "m"), QUIET)
    assert {path.name for path in tmp_path.iterdir()} == {"c"}
