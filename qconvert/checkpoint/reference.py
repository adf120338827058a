"""PyTorch's answer: the logits of transformers' own model, computed in float32 with bounded memory.

The checkpoint stays mapped in its own type. Each module gets its weights in float32 when it is
about to run and gives them back right after, so that one module's weights are the most that is
held in float32 at a time; the embedding is looked up row by row and the head is multiplied in
pieces of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qconvert.checkpoint.computed import computed_of
from qconvert.checkpoint.weights import CheckpointWeights

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

    from qconvert.formats.shortlist import Shortlist

EMBEDDING = "model.embed_tokens.weight"
# Elements of the head that are in float32 at a time: 64 MiB.
_HEAD_PIECE = 1 << 24


class WeightSource(Protocol):
    """Where a reference takes its weights from, by their names in the checkpoint."""

    description: str

    @property
    def shortlist(self) -> Shortlist | None:
        """Which tokens have logits from all bits of the head, others from half of them; None: all."""
        ...

    def coarse_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Rows of the head from half of its bits, float32; only where there is a ``shortlist``."""
        ...

    def rows(self, name: str, rows: slice | torch.Tensor) -> torch.Tensor:
        """The given rows of a tensor in float32; ``slice(None)`` is all of it."""
        ...

    def __contains__(self, name: str) -> bool: ...

    def release(self, name: str) -> None:
        """``name`` is not needed for now: its file pages may leave memory."""
        ...


class CheckpointSource:
    """The checkpoint's own weights, upcast where they are not float32 already."""

    shortlist = None

    def __init__(self, model: PreTrainedModel) -> None:
        self._weights = CheckpointWeights(model)
        computed = computed_of(model)
        found = {
            str(parameter.dtype).removeprefix("torch.")
            for name, parameter in model.named_parameters()
            if name not in computed
        }
        stored = " and ".join([*sorted({each.stored_as for each in computed.values()}), *sorted(found)])
        upcast = "" if stored == "float32" else f" (weights {stored}, upcast layer by layer)"
        self.description = f"float32{upcast}"

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def rows(self, name: str, rows: slice | torch.Tensor) -> torch.Tensor:
        return self._weights.rows(name, rows)

    def coarse_rows(self, name: str, rows: slice) -> torch.Tensor:
        raise AssertionError("a checkpoint has no shortlist")

    def release(self, name: str) -> None:
        self._weights.release(name)


class KVObserver(Protocol):
    """Sees a layer's keys and values (rotated, float32) before its attention does, and may change them."""

    def cache(self, lengths: Sequence[int]) -> Cache:
        """A cache for one batch whose rows have these numbers of tokens; attention sees what it returns."""
        ...


@dataclass(frozen=True)
class PromptWeights:
    """Other weights for the linear layers of each sequence's first ``tokens`` positions."""

    source: WeightSource
    tokens: int


class Reference:
    """A loaded model of transformers, of any dtype, that computes in float32.

    Args:
        model: in eval mode; its weights are untouched between calls.
        source: other weights to compute with, in place of the checkpoint's.
        prompt: weights for the prompt, where a second graph reads it with its own.
        kv: looks at keys and values, or changes them as the export's KV cache does.

    Attributes:
        model: the model.
        kv: as given.
        dtype: what it computes in, for people: "float32 (weights bfloat16, upcast layer by layer)".
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: WeightSource | None = None,
        prompt: PromptWeights | None = None,
        kv: KVObserver | None = None,
    ) -> None:
        import torch

        assert prompt is None or source is not None, "a second graph stands beside a first one"
        self.model = model
        self._prompt = prompt
        self.kv = kv
        self._source = source or CheckpointSource(model)
        self.dtype = self._source.description
        # A float32 checkpoint needs no swapping: transformers runs as it is.
        whole = all(parameter.dtype == torch.float32 for parameter in model.parameters())
        self._swaps = source is not None or not whole

    def hidden_states(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The decoder's output before the head, float32 ``[tokens, hidden_size]`` for each sequence.

        All sequences run as one batch, so that each weight is fetched once. They are padded on the
        right, where no real token attends to the padding.
        """
        import torch

        longest = max(len(tokens) for tokens in sequences)
        batch = torch.tensor([[*tokens, *[0] * (longest - len(tokens))] for tokens in sequences])
        handles = self._install_hooks() if self._swaps else []
        cache = self.kv.cache([len(tokens) for tokens in sequences]) if self.kv else None
        try:
            with torch.no_grad():
                decoded = self.model.model(input_ids=batch, past_key_values=cache, use_cache=False)
                hidden = decoded.last_hidden_state
        finally:
            for handle in handles:
                handle.remove()
        return [hidden[row, : len(tokens)] for row, tokens in enumerate(sequences)]

    def head(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits float32 ``[tokens, vocab]`` of some rows of ``hidden_states``."""
        import torch

        if (steps := self.two_steps(hidden)) is not None:
            assert self.shortlist is not None
            return self.shortlist.apply(*steps)
        with torch.no_grad():
            if not self._swaps:
                return torch.nn.functional.linear(hidden, self.model.lm_head.weight)
            return self._multiply_head(hidden, self._source.rows)

    def two_steps(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Logits from half of the head's bits, and from all of them; None where there is no ``shortlist``."""
        import torch

        if self.shortlist is None:
            return None
        with torch.no_grad():
            coarse = self._multiply_head(hidden, self._source.coarse_rows)
            return coarse, self._multiply_head(hidden, self._source.rows)

    @property
    def shortlist(self) -> Shortlist | None:
        """As the source has it."""
        return self._source.shortlist

    def _multiply_head(
        self, hidden: torch.Tensor, fetch: Callable[[str, slice], torch.Tensor]
    ) -> torch.Tensor:
        import torch

        name = EMBEDDING if self.model.config.tie_word_embeddings else "lm_head.weight"

        rows, columns = self.model.lm_head.weight.shape
        logits = torch.empty(hidden.shape[0], rows)
        step = max(1, _HEAD_PIECE // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            logits[:, part] = torch.nn.functional.linear(hidden, fetch(name, part))
        self._source.release(name)
        return logits

    def logits(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits float32 ``[tokens, vocab]`` of one sequence.

        With a vocabulary of 151,936, 512 tokens are 311 MB: for long sequences call ``head`` on
        some rows of ``hidden_states`` at a time.
        """
        return self.head(self.hidden_states([token_ids])[0]).numpy()

    def _install_hooks(self) -> list[Any]:
        decoder = self.model.model
        handles: list[Any] = []
        for name, module in decoder.named_modules(prefix="model"):
            if module is decoder.embed_tokens:
                handles.append(module.register_forward_hook(self._look_up))
            elif module._parameters:
                fetch, give_back = self._swap(name, module)
                handles.append(module.register_forward_pre_hook(fetch))
                if self._prompt is not None and name.endswith("_proj"):
                    handles.append(module.register_forward_hook(self._read_prompt(name, self._prompt)))
                # always_call: a module that raises has to give its weights back as well.
                handles.append(module.register_forward_hook(give_back, always_call=True))
        return handles

    @staticmethod
    def _read_prompt(name: str, prompt: PromptWeights) -> Callable[..., None]:
        """A hook that computes a linear layer's first positions again, with the prompt's weights."""
        import torch

        def read(module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            if f"{name}.weight" not in prompt.source:
                return  # that graph ends with the last layer's keys and values
            weight = prompt.source.rows(f"{name}.weight", slice(None))
            bias = None if module.bias is None else prompt.source.rows(f"{name}.bias", slice(None))
            first = slice(prompt.tokens)
            output[:, first] = torch.nn.functional.linear(inputs[0][:, first], weight, bias)

        return read

    def _look_up(self, module: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
        """The embedding of the tokens that occur, in float32, in place of the module's own output."""
        import torch

        tokens, places = torch.unique(inputs[0], return_inverse=True)
        return self._source.rows(EMBEDDING, tokens)[places]

    def _swap(self, prefix: str, module: Any) -> tuple[Callable[..., None], Callable[..., None]]:
        """Hooks that give a module its own parameters in float32, and take them away again."""
        names = [name for name, parameter in module._parameters.items() if parameter is not None]
        stored: dict[str, torch.Tensor] = {}

        def fetch(*_: Any) -> None:
            for name in names:
                parameter = module._parameters[name]
                stored[name] = parameter.data
                parameter.data = self._source.rows(f"{prefix}.{name}", slice(None))

        def give_back(*_: Any) -> None:
            for name in names:
                if name in stored:
                    module._parameters[name].data = stored.pop(name)
                    self._source.release(f"{prefix}.{name}")

        return fetch, give_back
