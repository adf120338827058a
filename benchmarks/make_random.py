"""Write a checkpoint of a model's shape with random bf16 weights: python -m benchmarks.make_random 1.5b DIR

Time and memory of an export, and the speed of a decode, depend on shapes and not on values. The values are
normal with the standard deviation 0.02 of an untrained model (norms near 1). No more than some megabytes
are in memory at once.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.shapes import SHAPES

SHARD_BYTES = 5_000_000_000  # as transformers cut the published checkpoints
PIECE = 1 << 22
DONE = "random-checkpoint.json"

Shapes = dict[str, tuple[int, ...]]


def make_random(shape: str, folder: Path, *, seed: int = 0) -> Path:
    """Write the checkpoint, unless the folder holds it already; returns the folder."""
    identity = {"shape": shape, "seed": seed, "config": SHAPES[shape]}
    marker = folder / DONE
    if marker.is_file() and json.loads(marker.read_text()) == identity:
        return folder
    from transformers import AutoConfig

    from qconvert.models.families import spec_of
    from qconvert.models.recorder import expected_tensors
    from tests.tiny import write_tiny_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(SHAPES[shape], indent=2))
    generation = {"bos_token_id": 256, "eos_token_id": [258], "pad_token_id": 256, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    write_tiny_tokenizer(folder)

    generator = np.random.default_rng(seed)
    shards = list(_shards(expected_tensors(spec_of(AutoConfig.for_model(**SHAPES[shape])))))
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        name = (
            f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        )
        _write_safetensors(folder / name, tensors, generator)
        places |= dict.fromkeys(tensors, name)
    if len(shards) > 1:
        total = sum(_nbytes(tensors) for tensors in shards)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    marker.write_text(json.dumps(identity))
    return folder


def _nbytes(tensors: Shapes) -> int:
    return sum(2 * math.prod(shape) for shape in tensors.values())


def _shards(tensors: Shapes) -> Iterator[Shapes]:
    shard: Shapes = {}
    for name, shape in tensors.items():
        if shard and _nbytes(shard) + 2 * math.prod(shape) > SHARD_BYTES:
            yield shard
            shard = {}
        shard[name] = shape
    yield shard


def _write_safetensors(path: Path, tensors: Shapes, generator: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors.items():
            left = math.prod(shape)
            while left:
                count = min(left, PIECE)
                values = generator.standard_normal(count, dtype=np.float32)
                values *= np.float32(0.02)
                if "norm" in name:
                    values += 1
                file.write(_bfloat16(values).tobytes())
                left -= count


def _bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves of finite float32 numbers, rounded to nearest, ties to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_random", description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(make_random(arguments.shape, arguments.folder, seed=arguments.seed))


if __name__ == "__main__":
    main()
