"""Columns of one size for GPTQ: what lies off a checkpoint's own proportions rounds as well as what does not.

Channels can be scaled against one another without a change of what a model computes (``formats/folding.py``),
and two checkpoints that compute the same may differ in just that. GPTQ's blocks of columns share a scale, so
that a column which is small beside its neighbours is rounded away, and what is added to the diagonal of its
Hessian is little for large inputs and much for small ones. So each input's columns get the same root mean
square: f = 1 / w, with w the geometric mean over the matrices that read it. That follows from the weights
alone, and undoes any such scaling. Factors that look at the inputs as well, as awq's do, are no better or
worse here (mean KL of the sample 0.102; with x^0.3 / w^0.7 0.100, with their roots 0.116, without any 0.111
with less on the diagonal).
"""

from __future__ import annotations

import torch

from qconvert.calibration.smoothing import factors_for
from qconvert.calibration.work import Factors
from qconvert.formats.folding import FoldedInput, FoldedWeights, Folding, Weights, decoder_inputs
from qconvert.formats.layout import NonFiniteWeightError, is_finite, row_ranges
from qconvert.models.spec import DecoderSpec


def equal_columns(weights: Weights, spec: DecoderSpec) -> Factors:
    """The factors of every input of every layer, in values of bfloat16, so that they are short.

    Raises:
        NonFiniteWeightError: NaN or Inf in a weight.
    """
    factors = Factors()
    for layer in range(spec.num_hidden_layers):
        for found in decoder_inputs(layer, spec.num_attention_heads, spec.num_key_value_heads):
            folded = FoldedWeights(weights, Folding.of_inputs(factors))
            sizes = torch.stack([_size(folded, name, found) for name in found.readers])
            # A column of zeros in any of them leaves no mean, and gets no factor.
            mean = sizes.log().mean(0).exp()
            factors[found] = factors_for(torch.ones_like(mean), mean, 0.0).bfloat16().float()
    return factors


def _size(weights: FoldedWeights, name: str, found: FoldedInput) -> torch.Tensor:
    """The root of each column's sum of squares, of those that share a factor the mean."""
    weight = weights[name]
    total = torch.zeros(weight.shape[1])
    for part in row_ranges(weight):
        total += weight[part].float().square().sum(0)
    weights.release(name)
    if not is_finite(total):
        raise NonFiniteWeightError(name)
    return found.of_rows(total).sqrt()
