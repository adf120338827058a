"""Adapters as a user names them, their files held against the model, and the tensors that they change."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qconvert.checkpoint.adapters.merge import Base, InFile, Merged, Product
from qconvert.checkpoint.adapters.settings import CONFIG, MERGE_YOURSELF, AdapterSettings, read_settings
from qconvert.checkpoint.computed import Computed
from qconvert.checkpoint.file_state import BrokenFileError, refuse_pointer
from qconvert.checkpoint.files import TensorInfo
from qconvert.checkpoint.fit import FLOAT_DTYPES
from qconvert.checkpoint.hashing import hash_files
from qconvert.checkpoint.header import read_header
from qconvert.checkpoint.quantised.tensors import TensorFiles
from qconvert.errors import QconvertError
from qconvert.formats.stored import VOCABULARY

if TYPE_CHECKING:
    import torch

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_LORA = re.compile(r"(.+)\.lora_(A|B)\.weight$|(.+)\.lora_embedding_(A|B)$")
_EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True)
class Adapter:
    """One adapter, read; of its weights only the headers.

    Attributes:
        folder: as the user names it.
        weight: with which it is added; 1 is as it was trained.
        settings: of adapter_config.json.
        files: its tensors.
    """

    folder: Path
    weight: float
    settings: AdapterSettings
    files: TensorFiles

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        paths = [self.folder / CONFIG, self.folder / WEIGHTS]
        return {
            "name": self.folder.resolve().name,
            "weight": self.weight,
            "rank": self.settings.rank,
            "alpha": self.settings.alpha,
            "sha256": hash_files(paths),
        }


def read_adapter(text: str) -> Adapter:
    """An adapter by what follows ``--adapter``: FOLDER or FOLDER=WEIGHT.

    Raises:
        QconvertError: no such folder, no LoRA adapter in it, or a weight that is none.
    """
    folder, weight = Path(text).expanduser(), 1.0
    if not folder.exists() and "=" in text:
        name, _, number = text.rpartition("=")
        folder = Path(name).expanduser()
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not math.isfinite(weight) or weight == 0:
            raise QconvertError(
                f"{number!r} is no weight for an adapter", where=text, hint="give a number, as in FOLDER=0.5"
            )
    if not folder.is_dir():
        what = "is a file, not an adapter's folder" if folder.is_file() else "is not there"
        raise QconvertError(
            f"The adapter {folder} {what}.",
            where=text,
            hint="give a folder that peft's save_pretrained has made",
        )
    settings = read_settings(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise QconvertError(
            "This adapter has pickle weights only, which can run code when loaded."
            if pickled
            else f"The adapter has no {WEIGHTS}.",
            where=path,
            hint="where you trust it, save it again with peft: save_pretrained(NEW_FOLDER)",
        )
    try:
        refuse_pointer(path)
        header = read_header(path, path.stat().st_size)
    except BrokenFileError as broken:
        raise QconvertError(
            f"{WEIGHTS} is unusable: {broken.detail}.", where=path, hint=broken.hint
        ) from broken
    tensors = {name: TensorInfo(*value, WEIGHTS) for name, value in header.items()}
    return Adapter(folder, weight, settings, TensorFiles(folder, tensors))


def merge(
    adapters: Sequence[Adapter],
    computed: Mapping[str, Computed],
    files: TensorFiles,
    expected: Mapping[str, tuple[int, ...]],
    tied: bool,
) -> dict[str, Computed]:
    """The tensors that adapters change.

    Args:
        adapters: in the order in which they are added.
        computed: the checkpoint's tensors that no file holds as floats.
        files: all others.
        expected: the model's tensors with their shapes.
        tied: whether the head is the embedding.

    Raises:
        QconvertError: an adapter of another model, or one that changes what another has replaced.
    """
    products: dict[str, list[Product]] = {}
    bases: dict[str, Base] = {}
    for adapter in adapters:
        added, replaced = _changes(adapter, expected)
        if len(adapters) > 1 or adapter.weight != 1:
            for name in replaced:
                raise QconvertError(
                    f"This adapter has {name} as a whole, which no weight and no other adapter goes with.",
                    where=adapter.folder,
                    hint=f"give it alone and without a weight, or {MERGE_YOURSELF}",
                )
        if tied and (changed := [name for name in VOCABULARY if name in added or name in replaced]):
            raise QconvertError(
                f"The adapter changes {changed[0]}, and in this model embedding and head are one tensor, of "
                "which peft changes one use only.",
                where=adapter.folder,
                hint=MERGE_YOURSELF,
            )
        bases |= replaced
        for name, product in added.items():
            products.setdefault(name, []).append(product)
    found: dict[str, Computed] = {}
    for name in (name for name in expected if name in bases or name in products):
        quantised = computed.get(name)
        base = bases.get(name) or quantised or InFile(files, name)
        found[name] = Merged(expected[name], base, tuple(products.get(name, ())), quantised)
    return found


def _changes(
    adapter: Adapter, expected: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Product], dict[str, Base]]:
    """What one adapter adds to tensors, and which it has in their places."""
    left = {name.removeprefix(_PREFIX): name for name in adapter.files}
    added: dict[str, Product] = {}
    replaced: dict[str, Base] = {}
    for name in list(left):
        if name not in left:
            continue
        if found := _LORA.match(name):
            module = found[1] or found[3]
            added[f"{module}.weight"] = _product(adapter, module, left, expected)
        else:
            target = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            replaced[target] = _replacement(adapter, target, left.pop(name), expected)
    for name in expected:
        module, _, kind = name.rpartition(".")
        due = kind == "weight" and len(expected[name]) == 2
        if due and (name in added) != adapter.settings.targeted(module, module != _EMBEDDING):
            what = "has matrices for" if name in added else "lacks its matrices for"
            says = "does not target it" if name in added else "targets it"
            raise QconvertError(
                f"The adapter {what} {module}, and {CONFIG} {says}.",
                where=adapter.folder,
                hint="copy both files from where the adapter was trained",
            )
    return added, replaced


def _product(
    adapter: Adapter, module: str, left: dict[str, str], expected: Mapping[str, tuple[int, ...]]
) -> Product:
    rank, factor = adapter.settings.scaling(module)
    embedding = module == _EMBEDDING
    ends = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    rows, columns = _shape(adapter, f"{module}.weight", expected)
    due = ((rank, rows), (columns, rank)) if embedding else ((rank, columns), (rows, rank))
    pair: list[torch.Tensor] = []
    for end, shape in zip(ends, due):
        name = left.pop(f"{module}.{end}", None)
        found = None if name is None else adapter.files[name]
        if name is None or found is None or found.shape != shape or found.dtype not in FLOAT_DTYPES:
            is_there = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
            raise QconvertError(
                f"{module}.{end} {is_there}, due is {list(shape)} for this model and rank {rank}: the "
                "adapter was trained on another model, or its configuration is another one's.",
                where=adapter.folder / WEIGHTS,
                hint="give the model that adapter_config.json names as base_model_name_or_path",
            )
        pair.append(adapter.files.read(name).float())
    first, second = pair
    if embedding:
        first, second = second.t(), first.t()
    return Product(second, first, factor * adapter.weight)


def _replacement(adapter: Adapter, name: str, stored: str, expected: Mapping[str, tuple[int, ...]]) -> Base:
    shape = _shape(adapter, name, expected)
    found = adapter.files[stored]
    if found.shape != shape or found.dtype not in FLOAT_DTYPES:
        raise QconvertError(
            f"{name} is {found.dtype} {list(found.shape)} in the adapter, the model's is {list(shape)}: "
            "tokens were added, or it was trained on another model.",
            where=adapter.folder / WEIGHTS,
            hint=MERGE_YOURSELF,
        )
    return InFile(adapter.files, stored)


def _shape(adapter: Adapter, name: str, expected: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
    if name not in expected:
        raise QconvertError(
            f"The adapter changes {name}, which this model does not have.",
            where=adapter.folder / WEIGHTS,
            hint="give the model that adapter_config.json names as base_model_name_or_path",
        )
    return expected[name]
