"""Writes the record of what a calibration has rounded, with which the proof compares what was stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.calibration.gptq.store import RoundedWeights
from qconvert.formats.blocks import unpack
from qconvert.formats.channels import InputChannels, channel_groups, channel_layout, unpack_int8_channels
from qconvert.formats.layout import PackedWeight, row_ranges
from qconvert.formats.recipe import BlockFormat, ChannelFormat, Recipe
from qconvert.formats.record import Digest, add_to_record
from qconvert.formats.stored import VOCABULARY
from qconvert.parallel import piece_workers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def write_record(folder: Path, model: PreTrainedModel, recipe: Recipe, store: RoundedWeights) -> None:
    """``rounding.json``: for each weight that was rounded on purpose, the digest of what it stands for."""
    columns = {name: tensor.shape[-1] for name, tensor in model.named_parameters()}
    channels: int = model.config.intermediate_size
    solves_all = recipe.calibration is not None and recipe.calibration.method == "gptq"

    def digest(name: str) -> str | None:
        if isinstance(recipe.linear, ChannelFormat):
            return _digest(_of_channels(name, store[name], channels, recipe.linear))
        fmt = recipe.head if name in VOCABULARY else recipe.format_of(name)
        if fmt is None or not (fmt.halves or fmt.bits == 4 or (solves_all and name not in VOCABULARY)):
            return None
        return _digest(_of_blocks(store[name], fmt, columns[name]))

    names = list(store)
    with piece_workers() as workers:
        digests = zip(names, workers.map(digest, names), strict=True)
        add_to_record(folder, {name: each for name, each in digests if each is not None})


def _digest(pieces: Iterator[torch.Tensor]) -> str:
    digest = Digest()
    for rows in pieces:
        digest.add(rows)
    return digest.text


def _of_blocks(packed: PackedWeight, fmt: BlockFormat, columns: int) -> Iterator[torch.Tensor]:
    """The float32 weight for which it stands, some rows at a time."""
    for part in row_ranges(packed.data):
        zeros = None if packed.zero_points is None else packed.zero_points[part]
        yield unpack(PackedWeight(packed.data[part], packed.scales[part], zeros), fmt, columns)


def _of_channels(
    name: str, packed: PackedWeight, channels: int, fmt: ChannelFormat
) -> Iterator[torch.Tensor]:
    """The same of a matrix for integer products, ``channels``: of the MLP between."""
    import torch

    layout, (columns, _) = channel_layout(name, channels, fmt), packed.data.shape
    cuts = channel_groups(columns, layout.cuts if isinstance(layout, InputChannels) else 1)
    scales = packed.scales.view(len(cuts), -1)
    for part in row_ranges(packed.data.t()):
        values = zip(cuts, scales[:, part], strict=True)
        yield torch.cat([unpack_int8_channels(packed.data[cut, part], each) for cut, each in values], 1)
