"""A global model that is recurrent: a GRU cell, whose states are kept until they are settled."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor, nn

from blt_core import BuildContext, Component, EngineError, Latents, at_least


@attrs.frozen(kw_only=True)
class GruParams:
    """latent_dim: width of the latents, the same in all parts. layers: cells above one another."""

    latent_dim: int = attrs.field(validator=at_least(1))
    layers: int = attrs.field(default=1, validator=at_least(1))


class States:
    """The states after each patch that a rewind may still come back to.

    A state stands for all that was read, so those behind what is settled are dropped, but for the
    last: memory does not grow with the text.
    """

    def __init__(self, batch: int) -> None:
        self.first = [0] * batch
        self.states: list[list[Tensor]] = [[] for _ in range(batch)]

    @property
    def lengths(self) -> list[int]:
        """Patches read."""
        return [a + len(kept) for a, kept in zip(self.first, self.states, strict=True)]

    def rewind(self, lengths: Sequence[int]) -> None:
        """Go back to the state after so many patches."""
        for row, length in enumerate(lengths):
            kept = length - self.first[row]
            if kept < 0 or (kept == 0 and self.first[row] > 0):
                raise EngineError(f"row {row}: patches before {self.first[row] + 1} are settled")
            del self.states[row][kept:]

    def settle(self, lengths: Sequence[int]) -> None:
        """Drop the states that no rewind will ask for."""
        for row, length in enumerate(lengths):
            spare = min(length - 1, self.lengths[row] - 1) - self.first[row]
            if spare > 0:
                del self.states[row][:spare]
                self.first[row] += spare


class Gru(nn.Module):
    """Latents are the states of the last cell, added to the patches."""

    def __init__(self, params: GruParams, context: BuildContext) -> None:
        super().__init__()
        width = params.latent_dim
        self.cells = nn.ModuleList(nn.GRUCell(width, width) for _ in range(params.layers))
        self.out = nn.Linear(width, width)

    def new_cache(self, batch: int) -> States:
        """An empty cache."""
        return States(batch)

    def forward(self, embeddings: Latents, cache: States | None) -> Tensor:
        """(b, m, D): one patch of all texts after another."""
        x_bmD = embeddings.values_bmD
        cache = cache or States(len(embeddings.counts))
        out_bmD = torch.zeros_like(x_bmD)
        for row, count in enumerate(embeddings.counts):
            for j in range(count):
                kept = cache.states[row]
                before_lD = kept[-1] if kept else x_bmD.new_zeros(len(self.cells), x_bmD.shape[-1])
                after_lD = self._step(x_bmD[row, j], before_lD)
                kept.append(after_lD)
                out_bmD[row, j] = x_bmD[row, j] + self.out(after_lD[-1])
        return out_bmD

    def _step(self, x_D: Tensor, before_lD: Tensor) -> Tensor:
        states = []
        for cell, state_D in zip(self.cells, before_lD, strict=True):
            x_D = cell(x_D[None], state_D[None])[0]
            states.append(x_D)
        return torch.stack(states)


GRU = Component(
    "global_model", "acme/gru", Gru, GruParams, "a GRU over patches", {"latent_dim": "latent_dim"}
)
