"""Where the time of a prompt and of a decoded token goes, and how far each share is from its limit.

ONNX Runtime's own profiler tells the seconds of each node; Python's share is what is left of a call. Limits:

- Decoding reads every weight of the layers and of the head once: at best at the memory's own speed, which all
  threads measure here by reading an array that no cache holds.
- A prompt multiplies: at best at the rate of the same operator alone, with the model's largest matrix and as
  many rows, measured here.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from time import perf_counter, time
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime

from benchmarks.report import conditions, conditions_text, publish, table
from qrun.backends.opening import open_session
from qrun.backends.ort.session import OrtSession
from qrun.machine import usable_cores

_PRODUCTS = {"MatMulNBits", "MatMulIntegerToFloat", "FusedMatMul", "MatMul", "DynamicQuantizeMatMul"}
_NORMS = {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"}
_HEAD = "/lm_head/"
# Inside the head's Loop: the Loop's own time has them.
_INNER = {f"{_HEAD}{name}" for name in ("tokens", "state", "rows", "corrections", "goes_on")}
_PIECE = 256
_READ_BYTES = 512 << 20  # for each thread: more than a cache holds


def kind(operator: str, node: str) -> str:
    """The share to which a node's time belongs."""
    if node.startswith(_HEAD):
        return "head, product" if operator in _PRODUCTS else "head, shortlist"
    if operator in _PRODUCTS:
        return "matrix products"
    if operator == "GroupQueryAttention":
        return "attention"
    return "norms" if operator in _NORMS else "element-wise, rounding, shapes"


def profiled(folder: Path, threads: int, prefix: Path) -> OrtSession:
    """The folder's session, each graph with its profiler on."""
    plain, numbers = onnxruntime.SessionOptions, count()

    def options() -> Any:
        made = plain()
        made.enable_profiling = True
        made.profile_file_prefix = f"{prefix}-{next(numbers)}"  # two graphs are opened at once
        return made

    with mock.patch.object(onnxruntime, "SessionOptions", options):
        session = open_session(folder, threads=threads)
    assert isinstance(session, OrtSession)
    return session


def split(session: OrtSession, calls: list[tuple[float, float]]) -> dict[str, float]:
    """Seconds a call of each share, over calls of which begin and end are known, in ``time()`` seconds."""
    graphs = [session._inference]
    if session._prefill is not None:
        graphs.append(session._prefill.inference)
    shares: dict[str, float] = defaultdict(float)
    runs = 0.0
    for graph in graphs:
        offset = graph.get_profiling_start_time_ns() / 1e9
        file = Path(graph.end_profiling())
        for event in json.loads(file.read_text()):
            at = offset + event["ts"] / 1e6
            if not any(begin <= at <= end for begin, end in calls):
                continue
            if event["name"] == "model_run":
                runs += event["dur"] / 1e6
            elif event["name"].endswith("_kernel_time"):
                node = event["name"].removesuffix("_kernel_time")
                if node not in _INNER:
                    shares[kind(event["args"]["op_name"], node)] += event["dur"] / 1e6
    shares["between nodes"] = runs - sum(shares.values())
    shares["Python"] = sum(end - begin for begin, end in calls) - runs
    return {name: seconds / len(calls) for name, seconds in shares.items()}


def measure(folder: Path, threads: int, prompt: int, steps: int) -> dict[str, dict[str, float]]:
    """Seconds of each share for one prompt (the median of three), and for one token after it."""
    found = {}
    tokens = np.random.default_rng(0).integers(0, 1000, (1, prompt))
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("prompt", "decode"):
            session = profiled(folder, threads, Path(scratch) / name)
            calls: list[tuple[float, float]] = []
            for _ in range(4 if name == "prompt" else 1):
                cache = session.new_cache()
                begin = time()
                for start in range(0, prompt, _PIECE):
                    last = start + _PIECE >= prompt
                    session.forward(tokens[:, start : start + _PIECE], cache, "last" if last else "none")
                calls.append((begin, time()))
            if name == "prompt":
                calls = sorted(calls[1:], key=lambda call: call[1] - call[0])[1:2]
            else:
                calls = []
                for step in range(steps + 4):
                    begin = time()
                    session.forward(tokens[:, :1], cache)
                    if step >= 4:
                        calls.append((begin, time()))
            found[name] = split(session, calls)
            del session
    return found


def read_rate(threads: int) -> float:
    """Bytes a second that all threads together read from memory."""
    arrays = [np.ones(_READ_BYTES // 8, dtype=np.int64) for _ in range(threads)]
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(7):
            begin = perf_counter()
            list(pool.map(np.bitwise_or.reduce, arrays))
            rates.append(threads * _READ_BYTES / (perf_counter() - begin))
    return max(rates)


def product_rate(session: OrtSession, threads: int, integers: bool) -> float:
    """Operations a second, at best, of one product alone: 256 rows with the largest matrix of a layer."""
    from onnx import TensorProto, helper, numpy_helper

    facts = session.manifest.raw["model"]
    inputs, outputs = facts["hidden_size"], facts["intermediate_size"]
    random = np.random.default_rng(0)
    if integers:
        constants = {
            "w": random.integers(-127, 128, (inputs, outputs)).astype(np.int8),
            "a": np.float32(1),
            "b": np.full(outputs, 0.01, np.float32),
            "z": np.uint8(128),
        }
        node = helper.make_node(
            "MatMulIntegerToFloat", ["x", "w", "a", "b", "z"], ["y"], domain="com.microsoft"
        )
        kind_of_input, given = TensorProto.UINT8, random.integers(0, 256, (_PIECE, inputs)).astype(np.uint8)
    else:
        size = session.manifest.raw["recipe"]["linear"]["block_size"]
        constants = {
            "w": random.integers(0, 256, (outputs, -(-inputs // size), size // 2)).astype(np.uint8),
            "s": np.full((outputs, -(-inputs // size)), 0.01, np.float32),
        }
        node = helper.make_node(
            "MatMulNBits",
            ["x", "w", "s"],
            ["y"],
            domain="com.microsoft",
            K=inputs,
            N=outputs,
            bits=4,
            block_size=size,
            accuracy_level=4,
        )
        kind_of_input, given = TensorProto.FLOAT, random.standard_normal((_PIECE, inputs)).astype(np.float32)
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", kind_of_input, given.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [_PIECE, outputs])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    alone = onnxruntime.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    binding, seconds = alone.io_binding(), []
    binding.bind_cpu_input("x", given)
    result = np.empty((_PIECE, outputs), np.float32)
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(result))
    for _ in range(40):
        begin = perf_counter()
        alone.run_with_iobinding(binding)
        seconds.append(perf_counter() - begin)
    return 2 * _PIECE * inputs * outputs / min(seconds)


def layer_weights(session: OrtSession) -> int:
    """Weights of all linear layers; a prompt's graph ends before the last MLP."""
    facts = session.manifest.raw["model"]
    hidden, inner = facts["hidden_size"], facts["intermediate_size"]
    queries = facts["num_attention_heads"] * facts["head_size"]
    keys = facts["num_key_value_heads"] * facts["head_size"]
    attention = 2 * hidden * queries + 2 * hidden * keys
    return int(facts["num_hidden_layers"] * (attention + 3 * hidden * inner))


def bits_per_weight(fmt: dict[str, Any]) -> float:
    """Of a format in the manifest's recipe, scales and zero points included; half of what is in halves."""
    if "mlp_groups" in fmt:
        return 8.0
    bits = 4 if fmt.get("halves") else fmt["bits"]
    scale = 16 if fmt["scale_dtype"] == "bfloat16" else 32
    return bits + (scale + (0 if fmt["symmetric"] else bits)) / fmt["block_size"]


def decode_bytes(session: OrtSession, context: int) -> int:
    """Bytes that one token reads: layers, head, and keys and values of its context."""
    recipe, facts = session.manifest.raw["recipe"], session.manifest.raw["model"]
    head = facts["hidden_size"] * facts["vocab_size"] * bits_per_weight(recipe["head"]) / 8
    layers = layer_weights(session) * bits_per_weight(recipe["linear"]) / 8
    return int(layers + head) + context * session.manifest.kv.bytes_per_token


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.time_split", description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder in int4 or int8")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=48, help="decoded tokens (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=usable_cores(), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    chosen = parser.parse_args()
    facts = conditions({"qrun": sys.executable})
    session = open_session(chosen.folder, threads=chosen.threads)
    assert isinstance(session, OrtSession)
    recipe = session.manifest.raw["recipe"]
    integers = "mlp_groups" in recipe["linear"] or recipe["prefill"] is not None
    rate, bandwidth = product_rate(session, chosen.threads, integers), read_rate(chosen.threads)
    operations = 2 * layer_weights(session) * chosen.prompt
    read = decode_bytes(session, chosen.prompt + chosen.steps // 2)
    name = session.manifest.name
    del session
    shares = measure(chosen.folder, chosen.threads, chosen.prompt, chosen.steps)
    limits = {"prompt": operations / rate, "decode": read / bandwidth}
    rows = []
    for share in sorted({*shares["prompt"], *shares["decode"]}, key=lambda s: -shares["decode"].get(s, 0)):
        row = [share]
        for part in ("prompt", "decode"):
            seconds, whole = shares[part].get(share, 0.0), sum(shares[part].values())
            row += [f"{seconds * 1e3:.2f}", f"{seconds / whole:.0%}"]
        rows.append(row)
    totals = [f"{sum(shares[part].values()) * 1e3:.1f}" for part in ("prompt", "decode")]
    rows.append(["all", totals[0], "", totals[1], ""])
    rows.append(["limit", f"{limits['prompt'] * 1e3:.1f}", "", f"{limits['decode'] * 1e3:.1f}", ""])
    what = (
        f"{name}, {recipe['precision']}, {chosen.threads} threads; a prompt of {chosen.prompt} in pieces of "
        f"{_PIECE}, and one token behind it. "
        f"Limits: {operations / 1e9:,.0f} G operations at {rate / 1e9:,.0f} G "
        f"a second; {read / 1e6:,.0f} MB at {bandwidth / 1e9:.1f} GB a second."
    )
    result = {
        "benchmark": "time_split",
        "model": name,
        "recipe": recipe,
        "threads": chosen.threads,
        "prompt_tokens": chosen.prompt,
        "seconds": shares,
        "limits": limits,
        "operations_per_second": rate,
        "bytes_per_second": bandwidth,
        "decode_bytes": read,
        **facts,
    }
    header = ["share", "prompt ms", "", "one token ms", ""]
    publish("\n\n".join([what, table(header, rows), conditions_text(facts)]), result, chosen.json)


if __name__ == "__main__":
    main()
