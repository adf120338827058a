"""What an export is made for: which precisions there are, which graphs are written, and what qrun is told."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from qconvert.errors import QconvertError
from qconvert.formats.recipe import ChannelFormat, Recipe
from qconvert.formats.stored import BY_GROUPS
from qconvert.models.decoder import lower_decoder, lower_prompt
from qconvert.models.spec import DecoderSpec
from qconvert.recipes.forecast import kv_bytes_per_token
from qconvert.recipes.precisions import PRECISIONS, Capabilities

if TYPE_CHECKING:
    import onnx_ir as ir

    from qconvert.lowering.initializers import Initializers

DEFAULT_TARGET = "onnxruntime"
GRAPH_NAME = "model.onnx"
PREFILL_GRAPH_NAME = "prefill.onnx"
# Fewer tokens than this are read faster by the graph that decodes (benchmarks/README.md).
PREFILL_MIN_TOKENS = 32
STANDARD_GRAPH_NAME = "model.standard.onnx"
PROVIDER_GRAPH_NAME = "model.provider.onnx"
# GroupQueryAttention, with the rotary embedding in it, takes heads of a multiple of so many channels.
_HEADS_OF = 16
# Long enough for a conversation, and 32 MB a layer less than the 32,768 that Qwen2.5 could hold.
DEFAULT_STATIC_LENGTH = 4096
_LAYOUT = ["batch", "kv_heads", "length", "head_size"]


class Target(Protocol):
    """One runtime and its kind of graph.

    Attributes:
        name: as in the manifest.
        folder_name: what stands between the model's name and the precision in a folder's default name.
        capabilities: what recipes may ask of it.
        read_by_genai: whether onnxruntime-genai can open the folder.
    """

    name: str
    folder_name: str
    capabilities: Capabilities
    read_by_genai: bool

    def fit(self, spec: DecoderSpec, max_length: int | None) -> DecoderSpec:
        """The decoder as this target will run it: ``context_length`` becomes what its cache can hold.

        Raises:
            QconvertError: a length that the target or the model does not allow.
        """
        ...

    def lower(
        self, spec: DecoderSpec, recipe: Recipe, initializers: Initializers, rope: Any
    ) -> dict[str, ir.Model]:
        """The graphs by their file names, all over the same initializers."""
        ...

    def facts(self, spec: DecoderSpec, recipe: Recipe) -> dict[str, Any]:
        """The manifest's ``graph`` and ``kv_cache``."""
        ...


class OnnxRuntimeTarget:
    """One graph whose KV cache grows, for ONNX Runtime and for programs that use optimum's names."""

    name = "onnxruntime"
    folder_name = "onnx"
    capabilities = Capabilities(
        name,
        ("int8", *(precision for precision in PRECISIONS if precision != "int8")),
        activations="float32",
        integer_products=True,
        int8_kv_cache=True,
        calibrated=True,
    )
    read_by_genai = True

    def fit(self, spec: DecoderSpec, max_length: int | None) -> DecoderSpec:
        if max_length is not None:
            raise QconvertError(
                f"--max-length {max_length:,} is for --target tensorrt: ONNX Runtime's cache grows as needed",
                hint="leave --max-length out, or give --target tensorrt",
            )
        if spec.head_size % _HEADS_OF:
            raise QconvertError(
                f"the model's heads have {spec.head_size} channels, and ONNX Runtime's attention takes "
                f"multiples of {_HEADS_OF}",
                where="config.json, head_dim (or hidden_size / num_attention_heads)",
                hint="models that were trained have heads of 64 or 128: for a small one to test with, make "
                f"heads of {_HEADS_OF} or {2 * _HEADS_OF}",
            )
        return spec

    def lower(
        self, spec: DecoderSpec, recipe: Recipe, initializers: Initializers, rope: Any
    ) -> dict[str, ir.Model]:
        from qconvert.lowering.ort.decoder import OnnxRuntimeLowering
        from qconvert.lowering.ort.integers import IntegerLowering

        def of_prompts(fmt: ChannelFormat, own: Initializers) -> ir.Model:
            prompts = IntegerLowering(spec, recipe, fmt, own, rope, prompts=True)
            lower_prompt(spec, prompts)
            return prompts.model(f"{spec.model_type}_prefill")

        if isinstance(recipe.linear, ChannelFormat):
            folded = initializers.folded()
            integers = IntegerLowering(spec, recipe, recipe.linear, folded, rope)
            lower_decoder(spec, integers)
            graphs = {GRAPH_NAME: integers.model(spec.model_type)}
            if recipe.prefill is not None:  # over the same matrices, with another attention
                graphs[PREFILL_GRAPH_NAME] = of_prompts(recipe.prefill, folded.for_another_graph())
            return graphs
        lowering = OnnxRuntimeLowering(spec, recipe, initializers, rope)
        lower_decoder(spec, lowering)
        graphs = {GRAPH_NAME: lowering.model(spec.model_type)}
        if recipe.prefill is not None:
            with initializers.in_another_file(f"{PREFILL_GRAPH_NAME}.data") as others:
                graphs[PREFILL_GRAPH_NAME] = of_prompts(recipe.prefill, others.folded())
        return graphs

    def facts(self, spec: DecoderSpec, recipe: Recipe) -> dict[str, Any]:
        from qconvert.lowering.ort.grouped import chooses_attention

        returned = "present" if recipe.kv_cache is None else "new"  # lowering/rounded_kv.py
        prefill = {
            "prefill": {
                "file": PREFILL_GRAPH_NAME,
                "min_tokens": PREFILL_MIN_TOKENS,
                "outputs": [f"{returned}.{{layer}}.{{key|value}}"],
            }
        }
        return {
            "graph": {
                "file": GRAPH_NAME,
                "inputs": [
                    "input_ids",
                    "attention_mask",
                    "past_key_values.{layer}.{key|value}",
                    "logits_start",
                    *([BY_GROUPS] if chooses_attention(spec, recipe) else []),
                ],
                "outputs": ["logits", "present.{layer}.{key|value}"],
                **(prefill if recipe.prefill is not None else {}),
            },
            "kv_cache": _kv_facts(spec, recipe),
        }


class TensorRTTarget:
    """Two graphs over one data file, with a static KV cache: one for the builder, one for the proof.

    The builder's has TensorRT's own attention. The other differs in that alone, and ONNX Runtime's
    CPU provider can run it. float32 has the second only: TensorRT has no float32 attention kernel.
    """

    name = "tensorrt"
    folder_name = "tensorrt"
    capabilities = Capabilities(
        name, ("bf16", "fp16", "int4", "fp32"), activations="bfloat16", packed_columns=True, calibrated=True
    )
    read_by_genai = False

    def fit(self, spec: DecoderSpec, max_length: int | None) -> DecoderSpec:
        length = min(DEFAULT_STATIC_LENGTH, spec.context_length) if max_length is None else max_length
        if not 2 <= length <= spec.context_length:
            raise QconvertError(
                f"--max-length {length:,} is not within 2 and the model's context of "
                f"{spec.context_length:,} tokens",
                hint=f"use at most --max-length {spec.context_length}",
            )
        return replace(spec, context_length=length)

    def lower(
        self, spec: DecoderSpec, recipe: Recipe, initializers: Initializers, rope: Any
    ) -> dict[str, ir.Model]:
        from qconvert.lowering.trt.decoder import Spelling, TensorRTLowering
        from qconvert.lowering.trt.float32_kernels import compute_in_float32

        spellings: dict[str, Spelling] = {STANDARD_GRAPH_NAME: "standard"}
        if recipe.activations != "float32":
            spellings |= {GRAPH_NAME: "trt", PROVIDER_GRAPH_NAME: "standard"}
        graphs = {}
        for file, spelling in spellings.items():
            lowering = TensorRTLowering(spec, recipe, initializers, rope, spelling)
            lower_decoder(spec, lowering)
            graphs[file] = lowering.model(spec.model_type)
            initializers = initializers.for_another_graph()
        compute_in_float32(graphs[STANDARD_GRAPH_NAME])
        return graphs

    def facts(self, spec: DecoderSpec, recipe: Recipe) -> dict[str, Any]:
        float32 = recipe.activations == "float32"
        return {
            "graph": {
                "file": STANDARD_GRAPH_NAME if float32 else GRAPH_NAME,
                "standard_file": STANDARD_GRAPH_NAME,
                **({} if float32 else {"provider_file": PROVIDER_GRAPH_NAME}),
                "inputs": [
                    "input_ids",
                    "position_ids",
                    "logits_positions",
                    "past_key_values.{layer}.{key|value}",
                ],
                "outputs": ["logits", "present.{layer}.{key|value}"],
            },
            "kv_cache": {**_kv_facts(spec, recipe), "length": spec.context_length},
        }


TARGETS: dict[str, Target] = {target.name: target for target in (OnnxRuntimeTarget(), TensorRTTarget())}


def target_named(name: str) -> Target:
    """The target behind ``--target``.

    Raises:
        QconvertError: an unknown name.
    """
    if name not in TARGETS:
        raise QconvertError(f"unknown target {name!r}", hint=f"use one of {', '.join(TARGETS)}")
    return TARGETS[name]


def _kv_facts(spec: DecoderSpec, recipe: Recipe) -> dict[str, Any]:
    return {
        "dtype": recipe.kv_dtype,
        "layout": _LAYOUT,
        "bytes_per_token": kv_bytes_per_token(spec, recipe.kv_dtype),
    }
