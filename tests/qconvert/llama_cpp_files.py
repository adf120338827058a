"""Makes the files of tests/qconvert/data/gguf by llama.cpp's own quantiser, and its logits beside them.

    python -m tests.qconvert.llama_cpp_sources SOURCES              # here: tiny models in F32
    python tests/qconvert/llama_cpp_files.py SOURCES TARGET         # where llama-cpp-python is installed

Those in the repository are of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

# Bytes, merged tokens, and ids that no text has.
TOKENS = (84, 104, 101, 32, 99, 97, 116, 32, 115, 97, 116, 259, 261, 120, 200, 17)
MADE = {
    "qwen2": ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
    "qwen3": ("Q4_0",),
    "llama": ("Q4_0",),
    "wide": ("Q4_0", "Q4_K_M"),  # rows of 256, which K-quants need
}


def quantise(source: Path, target: Path, kind: str) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    params.nthread = 1
    failed = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    assert not failed, target


def logits(path: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Of every position, ``[tokens, vocab]``, with a cache of float32 and one thread."""
    settings = llama_cpp.llama_model_default_params()
    settings.n_gpu_layers = 0
    settings.use_extra_bufts = False  # weights as they are in the file
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), settings)
    assert model, path
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads, params.n_threads_batch = 256, 1, 1
    params.type_k, params.type_v, params.flash_attn_type = 0, 0, 0
    context = llama_cpp.llama_init_from_model(model, params)
    batch = llama_cpp.llama_batch_init(len(TOKENS), 0, 1)
    batch.n_tokens = len(TOKENS)
    for place, token in enumerate(TOKENS):
        batch.token[place], batch.pos[place] = token, place
        batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
    assert llama_cpp.llama_decode(context, batch) == 0
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    rows = [llama_cpp.llama_get_logits_ith(context, place) for place in range(len(TOKENS))]
    return np.stack([np.ctypeslib.as_array(row, (size,)).copy() for row in rows])


def main() -> None:
    sources, target = map(Path, sys.argv[1:])
    llama_cpp.llama_backend_init()
    found = {}
    for name, kinds in MADE.items():
        found[name] = logits(sources / f"{name}.gguf")
        for kind in kinds:
            path = target / f"{name}-{kind}.gguf"
            quantise(sources / f"{name}.gguf", path, kind)
            found[path.stem] = logits(path)
    np.savez_compressed(target / "logits.npz", **found)


if __name__ == "__main__":
    main()
