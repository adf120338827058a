"""transformers' model with the checkpoint's tensors in it, each in the type that its file holds.

``from_pretrained`` would round every tensor to the type that config.json names, and read adapters,
generation defaults and the choice of an attention kernel besides. Here nothing but the weight files is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qconvert.checkpoint.computed import Computed, attach, placeholder
from qconvert.checkpoint.config import quiet_transformers
from qconvert.errors import QconvertError
from qconvert.models.families import family_of, spec_of
from qconvert.models.recorder import expected_tensors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

_AGAIN = "download the whole checkpoint again"
_PIECE_ROWS = 4096


def assemble(
    config: PreTrainedConfig,
    weight_files: tuple[Path, ...],
    folder: Path,
    computed: Mapping[str, Computed] | None = None,
) -> PreTrainedModel:
    """The model in eval mode, its weights mapped from the files (privately: see ``CheckpointWeights``).

    Args:
        config: of the model.
        weight_files: safetensors files; those of another kind are read by ``computed`` alone.
        folder: the checkpoint's, for messages.
        computed: tensors that are not in these files as floats, in whose places placeholders stand.

    Raises:
        QconvertError: transformers refuses the configuration; a tensor that is missing or of another shape
            (files that changed after they were checked); values beyond float32; or a head that differs from
            the embedding although the config ties them.
    """
    import torch

    family = family_of(config)
    try:
        with quiet_transformers(), torch.device("meta"):
            model = family.transformers_class("ForCausalLM")(config)
    except Exception as error:  # transformers has no error class of its own for a bad value
        reason = " ".join(str(error).split())
        raise QconvertError(
            f"transformers refuses this configuration: {reason}", where=folder / "config.json"
        ) from error
    # Computed, not stored: it needs real numbers.
    model.model.rotary_emb = family.transformers_class("RotaryEmbedding")(config)

    computed = computed or {}
    tensors = _read(weight_files, folder) | {name: placeholder(each.shape) for name, each in computed.items()}
    _check_tied_head(config, tensors, folder)
    expected = expected_tensors(spec_of(config))
    for name, shape in expected.items():
        if name not in tensors:
            raise QconvertError(f"the weight files have missing keys: {name}", where=folder, hint=_AGAIN)
        if tuple(tensors[name].shape) != shape:
            what = f"{name} has shape {list(tensors[name].shape)}, the config implies {list(shape)}"
            raise QconvertError(what, where=folder, hint=_AGAIN)
        _check_range(name, tensors[name], folder)
    model.load_state_dict({name: tensors[name] for name in expected}, strict=False, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    attach(model, computed)
    return model.eval()


def _read(weight_files: tuple[Path, ...], folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    for path in (path for path in weight_files if path.suffix == ".safetensors"):
        try:
            with safe_open(path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise QconvertError(f"{path.name} cannot be read: {error}", where=path, hint=_AGAIN) from error
    return tensors


def _check_range(name: str, tensor: torch.Tensor, folder: Path) -> None:
    """Refuse float64 values beyond float32's range, in which qconvert and ONNX Runtime compute."""
    import torch

    if tensor.dtype != torch.float64:
        return
    for start in range(0, len(tensor), _PIECE_ROWS):
        piece = tensor[start : start + _PIECE_ROWS]
        if bool((torch.isfinite(piece) & ~torch.isfinite(piece.float())).any()):
            raise QconvertError(
                f"{name} has values that float32 cannot hold (largest: {piece.abs().max().item():.3g})",
                where=folder,
                hint="ask whoever trained the model: nothing computes a decoder in float64",
            )


def _check_tied_head(config: PreTrainedConfig, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if not config.tie_word_embeddings or head is None or embedding is None:
        return
    same = head.shape == embedding.shape and all(
        bool(
            (
                head[start : start + _PIECE_ROWS].double() == embedding[start : start + _PIECE_ROWS].double()
            ).all()
        )
        for start in range(0, len(head), _PIECE_ROWS)
    )
    if not same:
        raise QconvertError(
            "lm_head.weight differs from the embedding, although the config ties them.",
            where=folder / "config.json",
            hint="set tie_word_embeddings to false if the head was trained on its own",
        )
