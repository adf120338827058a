"""The proof of an int8 KV cache: its scales fit keys and values of texts that the calibration has not seen.

All else about such a cache shows in the logits, and sharply: PyTorch, when it computes with the export's
own weights, keeps keys and values in the same 8 bits. But it takes the scales from the export, so a wrong one
would not show. So the stored scales have to be, to the last bit, those of which the calibration has left a
digest; and they have to fit the keys and values that PyTorch computes for the texts of the proof.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qconvert.checkpoint.kv_observers import LARGEST, Observed, Rounded
from qconvert.checkpoint.reference import Reference
from qconvert.errors import QconvertError
from qconvert.formats.record import digest_of
from qconvert.formats.stored import kv_scale_name
from qconvert.models.family import head_size
from qconvert.proof.exported_weights import ExportedWeights
from qconvert.proof.limits import limit_value
from qconvert.proof.weight_check import WeightCheck, WeightFault

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


class ExactKV:
    """The proof of a cache that keeps keys and values as they are: there is nothing to watch or to round.

    Attributes:
        checkpoint: the reference itself.
        rounded: see ``KVProof``.
    """

    rounded = None

    def __init__(self, reference: Reference) -> None:
        self.checkpoint = reference


class KVProof:
    """Watches the checkpoint's keys and values, and rounds those of the export's own weights.

    Args:
        exported: the weights of the graph that decodes.
        reference: the checkpoint.

    Attributes:
        checkpoint: the same reference, watched.
        rounded: for references that are to keep keys and values as the export does.

    Raises:
        QconvertError: the graph has no scales, or scales of another shape.
    """

    def __init__(self, exported: ExportedWeights, graph: Path, reference: Reference) -> None:
        self._scales = stored_scales(exported, graph, reference.model.config)
        self._observed = Observed()
        self.checkpoint = Reference(reference.model, kv=self._observed)
        # The checkpoint's values are larger than the stored ones by what the export has divided them by.
        self._true_scales = {
            place: scale * exported.folding.of_cache(*place, scale) for place, scale in self._scales.items()
        }
        self.rounded = Rounded(lambda layer, part: self._true_scales[layer, part])

    def with_faults(self, check: WeightCheck, limits: str) -> WeightCheck:
        """The outcome for the weights and, once PyTorch has run, for the scales.

        Args:
            check: of the weights.
            limits: the column of the table of limits.
        """
        return replace(check, faults=(*check.faults, *self._faults(limits)))

    def with_record(self, check: WeightCheck, digests: Mapping[str, str]) -> WeightCheck:
        """The same for the digests that the calibration has left, by the names of the scales."""
        faults = [
            WeightFault(name, "not the scales that the calibration has determined")
            for name, scale in (
                (kv_scale_name(*place), scale[None, :, None]) for place, scale in self._scales.items()
            )
            if digests.get(name) != digest_of(scale)
        ]
        return replace(check, faults=(*check.faults, *faults))

    def with_prompts(self, check: WeightCheck, prompts: ExportedWeights, graph: Path) -> WeightCheck:
        """The same for a second graph, which fills the first one's cache."""
        config = self.checkpoint.model.config
        theirs = stored_scales(prompts, graph, config)
        faults = [
            WeightFault(f"{graph.name}: {kv_scale_name(*place)}", "not the scales of the graph that decodes")
            for place, scale in self._scales.items()
            if not bool((theirs[place] == scale).all())
        ]
        return replace(check, faults=(*check.faults, *faults))

    def _faults(self, limits: str) -> Iterator[WeightFault]:
        above, below = limit_value("kv_above", limits), limit_value("kv_below", limits)
        for place, largest in self._observed.largest.items():
            # Of what the scale can store, how much did these texts need? 1 is all of it.
            need = (largest / (self._true_scales[place] * LARGEST)).numpy()
            bad = ~((need <= above) & (need >= 1 / below)) & (largest > 0).numpy()
            if bad.any():
                head, channel = np.argwhere(bad)[0]
                yield WeightFault(
                    kv_scale_name(*place),
                    f"head {head}, channel {channel}: sizes up to {float(largest[head, channel]):.3g} were "
                    f"seen, {need[head, channel]:.3g} of what the scale can store "
                    f"(due: {1 / below:.3g} to {above:g}; {int(bad.sum())} channels)",
                )


def stored_scales(
    exported: ExportedWeights, graph: Path, config: PreTrainedConfig
) -> dict[tuple[int, str], torch.Tensor]:
    """The scales ``[kv_heads, head_size]`` in a graph, by layer and "key" or "value".

    Raises:
        QconvertError: they are not there, or have another shape.
    """
    import torch

    due, found = (1, config.num_key_value_heads, 1, head_size(config)), {}
    for place in ((layer, part) for layer in range(config.num_hidden_layers) for part in ("key", "value")):
        scale = exported.array(kv_scale_name(*place))
        if scale.shape != due or scale.dtype != np.float32:
            raise QconvertError(
                f"{kv_scale_name(*place)} is {scale.dtype} {list(scale.shape)}, due is float32 {list(due)}",
                where=graph,
                hint="export the model again",
            )
        found[place] = torch.from_numpy(scale.copy())[0, :, 0]
    return found
