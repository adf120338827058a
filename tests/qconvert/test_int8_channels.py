"""If these fail, 8-bit weights by channel are not the checkpoint's to half a step."""

from __future__ import annotations

import pytest
import torch

from qconvert.formats.channels import (
    StoredInputChannels,
    channel_groups,
    groups_in_a_part,
    pack_int8_channels,
    unpack_int8_channels,
)
from qconvert.formats.layout import NonFiniteWeightError
from qconvert.formats.recipe import ChannelFormat
from qconvert.parallel import piece_workers


def test_every_weight_is_within_half_a_step_of_its_channel():
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(0))
    weight[3] *= 1000
    data, scales = pack_int8_channels(weight)
    assert data.dtype == torch.int8
    assert data.shape == (80, 48)
    steps = weight.abs().amax(-1) / 127
    error = (unpack_int8_channels(data, scales) - weight).abs().amax(-1)
    assert bool((error <= steps * 0.5001).all())
    assert bool((error > steps * 0.3).all()), "finer than 8 bits can be: the comparison shows nothing"


def test_a_channel_of_zeros_stays_zeros():
    weight = torch.zeros(2, 16)
    weight[0, 3] = -2.0
    assert torch.equal(unpack_int8_channels(*pack_int8_channels(weight)), weight)


def test_several_threads_give_the_same_bytes():
    weight = torch.randn(3000, 400, generator=torch.Generator().manual_seed(1))
    with piece_workers() as workers:
        for one, several in zip(pack_int8_channels(weight), pack_int8_channels(weight, workers)):
            assert torch.equal(one, several)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value):
    weight = torch.ones(4, 16)
    weight[2, 5] = value
    with pytest.raises(NonFiniteWeightError):
        pack_int8_channels(weight)


@pytest.mark.parametrize(("channels", "groups"), [(128, 4), (4864, 4), (100, 3), (8, 4), (33, 2), (64, 1)])
def test_groups_cover_all_channels_once(channels, groups):
    cuts = channel_groups(channels, groups)
    assert [index for cut in cuts for index in range(channels)[cut]] == list(range(channels))
    assert len(cuts) <= groups
    assert all((cut.stop - cut.start) % 16 == 0 for cut in cuts[:-1])


def test_only_the_last_group_is_smaller():
    assert [cut.stop - cut.start for cut in channel_groups(100, 3)] == [48, 48, 4]


@pytest.mark.parametrize(
    ("channels", "groups"), [(4864, 2), (8960, 2), (1536, 2), (64, 1), (128, 2), (144, 1)]
)
def test_parts_are_cut_into_groups_of_one_size_or_not_at_all(channels, groups):
    assert groups_in_a_part(channels, ChannelFormat()) == groups


@pytest.mark.parametrize(
    ("channels", "parts"), [(1536, 2), (4864, 2), (8960, 4), (11008, 4), (18944, 8), (29568, 16)]
)
def test_a_part_is_as_long_as_it_may_be(channels, parts):
    fmt = ChannelFormat(mlp_groups=8).fitted(channels)
    assert (fmt.mlp_parts, fmt.mlp_groups) == (parts, max(8, parts))
    assert ChannelFormat(mlp_groups=2).fitted(channels).mlp_groups == parts


def test_groups_of_inputs_have_scales_of_their_own():
    """An outlier spoils the steps of its own group only."""
    weight = torch.randn(8, 96, generator=torch.Generator().manual_seed(2))
    weight[:, 5] *= 1000
    packed = [pack_int8_channels(weight[:, cut]) for cut in channel_groups(96, 3)]
    matrices, scales = ([part[index].numpy() for part in packed] for index in (0, 1))
    stored = StoredInputChannels(matrices, scales)
    assert stored.shape == (8, 96)
    assert stored.rounding.block_size == 32
    error = (stored.rows(slice(2, 7)) - weight[2:7]).abs()
    assert float(error[:, :32].max()) > 1
    assert float(error[:, 32:].max()) < 0.02
