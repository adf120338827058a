"""llama.cpp through llama-cpp-python's low-level functions, as llama-bench uses them."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from time import perf_counter

import llama_cpp
import numpy as np
from engine import Model, main
from gguf_writer import write_gguf

FTYPES = {
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}
BATCH = 2048  # llama.cpp's own defaults: a prompt is handed over in these pieces, computed in pieces of 512


def convert(source: Path, destination: Path, variant: str) -> None:
    destination.mkdir(parents=True, exist_ok=True)
    whole = destination / "unquantized.gguf"
    write_gguf(source, whole)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FTYPES[variant]
    params.nthread = os.cpu_count() or 1
    target = destination / "model.gguf"
    failed = llama_cpp.llama_model_quantize(os.fsencode(whole), os.fsencode(target), ctypes.byref(params))
    whole.unlink()
    if failed:
        raise SystemExit(f"llama_model_quantize returned {failed}")


class LlamaModel(Model):
    sequences = 1

    def __init__(self, folder: Path, variant: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        self.threads = threads
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(folder / "model.gguf"), params)
        if not self.model:
            raise SystemExit("llama.cpp could not load the file")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.context, self.capacity = None, 0
        self.reset(512)
        self.settings = {"flash_attn": "auto", "n_ubatch": 512, "kv": "f16"}
        self.settings["system"] = llama_cpp.llama_print_system_info().decode()

    def reset(self, capacity: int) -> None:
        self.position = 0
        if self.context is None or capacity > self.capacity:
            if self.context is not None:
                llama_cpp.llama_free(self.context)
            params = llama_cpp.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_seq_max = capacity * self.sequences, BATCH, self.sequences
            params.n_threads = params.n_threads_batch = self.threads
            self.context, self.capacity = llama_cpp.llama_init_from_model(self.model, params), capacity
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def _decode(self, ids: list[int], wanted: str, row: int = 0) -> np.ndarray:
        """Logits [1 or len(ids), vocab]: of the last position, or of all."""
        self.batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            asked = wanted == "all" or (wanted == "last" and index == len(ids) - 1)
            self._put(index, token, self.position + index, row, wanted=asked)
        failed = llama_cpp.llama_decode(self.context, self.batch)
        if failed:
            raise SystemExit(f"llama_decode returned {failed}")
        self.position += len(ids)
        rows = {"all": len(ids), "last": 1, "none": 0}[wanted]
        llama_cpp.llama_synchronize(self.context)
        if not rows:
            return np.empty((0, self.vocabulary), np.float32)
        found = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(found, shape=(rows, self.vocabulary))

    def prompt(self, ids: list[int]) -> int:
        for start in range(0, len(ids), BATCH):
            piece = ids[start : start + BATCH]
            logits = self._decode(piece, "last" if start + len(piece) == len(ids) else "none")
        return int(logits[-1].argmax())

    def step(self, token: int) -> int:
        return int(self._decode([token], "last")[0].argmax())

    def rows(self, prompts: list[list[int]], generate: int) -> float:
        """One sequence for each row, all of their tokens in one batch."""
        self.sequences, self.capacity = len(prompts), 0  # another number needs another context
        self.reset(len(prompts[0]) + generate)
        tokens = []
        for row, ids in enumerate(prompts):
            self.position = 0
            tokens.append(int(self._decode(ids, "last", row)[-1].argmax()))
        started = perf_counter()
        for _ in range(generate - 1):
            self.batch.n_tokens = len(tokens)
            for row, token in enumerate(tokens):
                self._put(row, token, self.position, row, wanted=True)
            if llama_cpp.llama_decode(self.context, self.batch):
                raise SystemExit("llama_decode failed")
            self.position += 1
            found = llama_cpp.llama_get_logits(self.context)
            logits = np.ctypeslib.as_array(found, shape=(len(tokens), self.vocabulary))
            tokens = logits.argmax(axis=-1).tolist()
        return perf_counter() - started

    def _put(self, index: int, token: int, position: int, row: int, *, wanted: bool) -> None:
        batch = self.batch
        batch.token[index], batch.pos[index], batch.logits[index] = token, position, wanted
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = row

    def logits(self, ids: list[int]) -> np.ndarray:
        self.reset(len(ids))
        pieces = [ids[start : start + 512] for start in range(0, len(ids), 512)]
        return np.concatenate([self._decode(piece, "all").copy() for piece in pieces])


if __name__ == "__main__":
    main(convert, LlamaModel, libraries=("llama_cpp",), packages=("llama-cpp-python", "gguf", "numpy"))
