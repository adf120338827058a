"""Which engines are compared, in which variants: the one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.peers.our_variants import QUALITY_ONLY
from benchmarks.peers.our_variants import VARIANTS as OUR_VARIANTS

PROGRAMS = Path(__file__).resolve().parent.parent / "peers"
OURS = "qconvert"


@dataclass(frozen=True)
class Peer:
    """An engine; its program is ``peers/<name>_engine.py``, its pins ``peers/requirements/<name>.txt``.

    ``variants`` maps the name that its program knows to the class of bits in which it competes.
    ``together``: its program can decode several answers at once; ``guesses``: it can try guessed tokens.
    ``build`` is the environment of pip, for a package that is compiled here; ``unwanted`` packages come with
    the others and go again.
    """

    name: str
    title: str
    variants: dict[str, int]
    build: dict[str, str] = field(default_factory=dict)
    unwanted: tuple[str, ...] = ()
    together: bool = False
    guesses: bool = False

    @property
    def program(self) -> Path:
        return PROGRAMS / f"{self.name}_engine.py"

    @property
    def requirements(self) -> Path:
        return PROGRAMS / "requirements" / f"{self.name}.txt"


PEERS = {
    peer.name: peer
    for peer in (
        Peer(
            OURS,
            "qconvert",
            {name: bits for name, (bits, _) in OUR_VARIANTS.items()},
            together=True,
            guesses=True,
        ),
        Peer(
            "llama_cpp",
            "llama.cpp",
            {"Q4_0": 4, "Q4_K_M": 4, "Q8_0": 8},
            {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
            together=True,
        ),
        # A torchvision that does not fit this torch breaks transformers; nothing here needs one.
        Peer(
            "openvino",
            "OpenVINO GenAI",
            {"int4": 4, "int8": 8},
            unwanted=("torchvision",),
            together=True,
            guesses=True,
        ),
        Peer("genai", "onnxruntime-genai", {"int4": 4, "int8": 8}),
        Peer("ctranslate2", "CTranslate2", {"int8": 8}),
        Peer("transformers", "transformers", {"bf16": 16, "fp32": 32}),
        Peer("optimum", "optimum-onnx", {"fp32": 32}),
    )
}


@dataclass(frozen=True)
class Contender:
    """One variant of one engine."""

    peer: Peer
    variant: str
    quality_only: bool = False  # its speed is not measured

    @property
    def name(self) -> str:
        return f"{self.peer.name} {self.variant}"

    @property
    def title(self) -> str:
        return f"{self.peer.title} {self.variant}"

    @property
    def short(self) -> str:
        """The title where there is little room."""
        return self.title.replace("onnxruntime-genai", "ORT-genai").replace(" GenAI", "")

    @property
    def bits(self) -> int:
        return self.peer.variants[self.variant]

    @property
    def ours(self) -> bool:
        return self.peer.name == OURS


def contenders(names: Sequence[str]) -> list[Contender]:
    """All variants of the named peers; "all" names every peer.

    A name may choose one variant: "llama_cpp:Q4_0". Ours take part without being named.

    Raises:
        KeyError: a name that the table does not have.
    """
    found: dict[str, Contender] = {}
    named = any(name.partition(":")[0] == OURS for name in names)
    everyone = list(PEERS) if "all" in names else [] if named else [OURS]
    for name in [*everyone, *(name for name in names if name != "all")]:
        peer, _, variant = name.partition(":")
        for each in [variant] if variant else PEERS[peer].variants:
            costly = peer == OURS and each in QUALITY_ONLY and not variant
            contender = Contender(PEERS[peer], each, quality_only=costly)
            if each not in contender.peer.variants:
                raise KeyError(f"{peer} has no variant {each}: {', '.join(contender.peer.variants)}")
            found[contender.name] = contender
    return list(found.values())
