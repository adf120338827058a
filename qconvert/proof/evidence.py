"""What is seen of one export: each part is looked at when the first proof asks for it, and only once."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from qconvert.checkpoint.load import Checkpoint
from qconvert.checkpoint.reference import Reference
from qconvert.errors import QconvertError
from qconvert.formats.recipe import Method
from qconvert.formats.record import read_factors
from qconvert.models.families import spec_of
from qconvert.progress import Progress
from qconvert.proof.cases import CaseSet, make_cases
from qconvert.proof.exported_weights import ExportedWeights
from qconvert.proof.head_proof import HeadProof
from qconvert.proof.kv_proof import ExactKV, KVProof
from qconvert.proof.limits import limits_name
from qconvert.proof.prefill_proof import prompt_weights
from qconvert.proof.report import Answer, GreedyResult, PathResult, TwinResult
from qconvert.proof.runs import answer_greedily, hidden_states
from qconvert.proof.weight_check import WeightCheck
from qrun.backends.opening import open_session
from qrun.backends.ort.static import with_graph
from qrun.backends.session import Session
from qrun.folder.manifest import Manifest, names_plan, read_manifest

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class Evidence:
    """One folder, or a plan in one, beside its checkpoint; and what the proofs have measured so far.

    Attributes:
        weights, paths, greedy, twins: results for the report, filled in by the proofs.
        head: the share of the logits' second step, collected while paths run.
        twin_logits: of the first text that the sharp twin of the graph that decodes has read.
        notes: what was not compared, and why.

    Raises:
        QrunError: it is not a model folder.
    """

    def __init__(self, path: Path, checkpoint: Checkpoint, reference: Reference, progress: Progress) -> None:
        self.path = path
        self.checkpoint = checkpoint
        self.reference = reference
        self.progress = progress
        self.manifest: Manifest = read_manifest(path)
        self.spec = spec_of(reference.model.config)
        self.of_plan = names_plan(path)
        self.weights = WeightCheck(0, 0, 0.0, None, ())
        self.paths: list[PathResult] = []
        self.greedy: GreedyResult | None = None
        self.twins: list[TwinResult] = []
        self.twin_logits: NDArray[np.float32] | None = None
        self.head = HeadProof()
        self.notes: list[str] = []

    @property
    def method(self) -> str | None:
        """How a calibration has rounded weights, as ``recipe.Method`` names it; None where there was none.

        Raises:
            QconvertError: a method that this version does not know.
        """
        method = self.manifest.recipe.method
        if method is not None and method not in get_args(Method):
            raise QconvertError(
                f'there are no limits for weights that were rounded by "{method}"',
                where=self.manifest.folder,
                hint="update it: pip install -U qconvert",
            )
        return method

    @property
    def limits(self) -> str:
        """The column of the table of limits."""
        manifest = self.manifest
        return limits_name(
            manifest.precision, method=self.method, kv_dtype=manifest.kv.dtype, kept=self.keeps_codes
        )

    @property
    def keeps_codes(self) -> bool:
        """Whether linear weights have to be those of the checkpoint's own codes."""
        return self.manifest.recipe.kept > 0

    @property
    def has_prompt_graph(self) -> bool:
        return self.manifest.prefill_path is not None

    @property
    def has_int8_cache(self) -> bool:
        return self.manifest.kv.dtype == "int8"

    @property
    def rounds(self) -> bool:
        """Whether the graph rounds anything; if not, its logits must be those of the checkpoint."""
        return self.exported.rounded or self.has_int8_cache

    @property
    def graph_path(self) -> Path:
        """The graph that runs here: of a folder for TensorRT, that in standard operators."""
        manifest = self.manifest
        if manifest.target == "tensorrt":
            manifest = with_graph(manifest, "standard_file")
        return manifest.graph_path

    @cached_property
    def exported(self) -> ExportedWeights:
        return ExportedWeights(self.manifest.graph_path, self.reference.model, recorded=self.factors)

    @cached_property
    def factors(self) -> dict[str, torch.Tensor]:
        """What the export says to have folded into its matrices before they were rounded."""
        return read_factors(self.manifest.folder) if self.method is not None else {}

    @cached_property
    def prompts(self) -> ExportedWeights:
        """The weights of the second graph."""
        assert self.manifest.prefill_path is not None
        return prompt_weights(self.manifest.prefill_path, self.reference.model, self.factors)

    @cached_property
    def int8_kv(self) -> KVProof:
        """The proof of an int8 KV cache."""
        return KVProof(self.exported, self.manifest.graph_path, self.reference)

    @property
    def kv(self) -> KVProof | ExactKV:
        return self.int8_kv if self.has_int8_cache else ExactKV(self.reference)

    @cached_property
    def cases(self) -> CaseSet:
        return make_cases(
            self.manifest.folder,
            self.manifest.model.vocab_size,
            self.manifest.model.context_length,
            static_cache=self.manifest.target == "tensorrt",
            one_position=self.of_plan,
        )

    @cached_property
    def session(self) -> Session:
        """The graph that decodes, alone."""
        return open_session(self.path, prefill_graph=False)

    @cached_property
    def device(self) -> str:
        return self.session.device

    @cached_property
    def answers(self) -> tuple[list[Answer], str | None]:
        """What qrun generates, and why it stopped early, if it did."""
        with self.progress.task("answering greedily", self.cases.greedy_steps) as advance:
            return answer_greedily(self.session, self.cases, advance)

    @cached_property
    def references(self) -> dict[str, Reference]:
        """PyTorch by the weights that it computes with."""
        found = {"checkpoint": self.kv.checkpoint}
        if self.rounds:
            found["own weights"] = Reference(self.reference.model, self.exported, kv=self.kv.rounded)
        return found

    @cached_property
    def hidden(self) -> dict[str, list[torch.Tensor]]:
        """PyTorch's hidden states of every case, and then of every greedy answer."""
        found = {}
        for name, source in self.references.items():
            with self.progress.task(f"PyTorch, {name}"):
                found[name] = hidden_states(source, self.cases, self.answers[0])
        return found

    def close_session(self) -> None:
        """Give back the memory of the session, before others are opened."""
        _ = self.device
        self.__dict__.pop("session", None)
