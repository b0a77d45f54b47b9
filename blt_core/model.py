"""A byte-latent model as its four parts, and the full forward that training runs.

Axes: b batch rows, r byte rows (BOS first), m patches, n blocks, D widths, V ids.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import islice
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from blt_core.protocols import MODEL_KINDS, Decoder, Encoder, GlobalModel, Patcher
from blt_core.types import Blocks, DecoderOutput, IdScheme, Latents, Parameters, Patches, Rows


@attrs.frozen(eq=False)
class Model:
    """patcher, encoder, global model and decoder; ``context_bytes`` is the longest text served.

    ``settings`` are the fully resolved config tables that rebuild it (empty if built by hand).
    ``kernels``: the digest of the choice of kernels that its weights have (None: the fixed rule);
    ``kernel_choice``: its text, which ``[run] kernels`` takes.
    """

    patcher: Patcher
    encoder: Encoder
    global_model: GlobalModel
    decoder: Decoder
    scheme: IdScheme = attrs.field(factory=IdScheme)
    context_bytes: int = 4096
    settings: Mapping[str, Any] = attrs.field(factory=dict)
    kernels: str | None = None
    kernel_choice: str | None = None

    def digest(self) -> str:
        """A name for the weights, and for how they are used."""
        name = hashlib.blake2b(repr(sorted(self.settings.items())).encode(), digest_size=16)
        for key, tensor in sorted(self.module_dict().state_dict().items()):
            flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            name.update(key.encode() + memoryview(flat.numpy()))
        return name.hexdigest()

    def module_dict(self) -> nn.ModuleDict:
        """The parts that hold parameters, by kind: tensor names are dotted config paths."""
        parts = {kind: getattr(self, kind) for kind in MODEL_KINDS}
        return nn.ModuleDict({k: part for k, part in parts.items() if isinstance(part, nn.Module)})

    def to(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        scorer_dtype: torch.dtype | None = None,
    ) -> Model:
        """Move all parameters, in place, to ``part_dtype`` of each part; returns the model."""
        for kind, part in self.module_dict().items():
            part.to(device=device, dtype=part_dtype(kind, dtype, scorer_dtype))
        return self

    @property
    def device(self) -> torch.device:
        """Where the decoder's parameters are."""
        for parameter in self.module_dict().parameters():
            return parameter.device
        return torch.device("cpu")

    @property
    def variant(self) -> str:
        """How passes are run beyond device and dtype: measured kernels, compiled, scorer's dtype.

        As ``"measured kernels, compiled, bfloat16 scorer"``; empty with the fixed rule alone.
        """
        parts = self.module_dict()
        dtypes = {kind: first.dtype for kind, part in parts.items() for first in _first(part)}
        usual = part_dtype("patcher", dtypes.get("decoder", torch.float32))
        scorer = dtypes.get("patcher", usual)
        told = {
            "measured kernels": self.kernels is not None,
            "compiled": any(getattr(part, "compiles", None) for part in parts.modules()),
            f"{str(scorer).removeprefix('torch.')} scorer": scorer != usual,
        }
        return ", ".join(name for name, on in told.items() if on)

    def parameter_counts(self) -> Parameters:
        """Parameter counts by part; the byte scorer, and an encoder's look-up tables, apart.

        An encoder tells the size of its tables by an attribute ``table_parameters``.
        """
        tables = getattr(self.encoder, "table_parameters", 0)
        return Parameters(
            decoder=_size(self.decoder),
            encoder=_size(self.encoder) - tables,
            global_model=_size(self.global_model),
            tables=tables,
            scorer=_size(self.patcher),
        )

    def forward(self, rows: Rows, flags_br: Tensor, blocks: Blocks | None = None) -> DecoderOutput:
        """All rows of whole sequences at once, without caches: the training layout.

        ids: BOS first. flags_br: bool, place i is flag i + 1, as ``Patcher.flags`` gives it.
        """
        patches, latent_br = patch_layout(flags_br, rows.lengths)
        states = self.encoder.byte_states(rows, None)
        embeddings = self.encoder.patch_embeddings(states, patches)
        latents = self.global_model.forward(Latents(embeddings, patches.counts), None)
        given = states if self.decoder.reads_byte_states else None
        clean = Rows(rows.ids_br, rows.lengths, latent_br, given)
        return self.decoder.forward(clean, blocks, Latents(latents, patches.counts), None)


def patch_layout(flags_br: Tensor, lengths: tuple[int, ...]) -> tuple[Patches, Tensor]:
    """Closed patches of whole sequences, and the latent that each clean row reads (b, r).

    Row i reads the newest patch that is closed given the lookahead flag i + 1: number
    patch(i + 1) - 1 (Fast BLT).
    """
    device, width = flags_br.device, flags_br.shape[1]
    valid = torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]
    flags = flags_br & valid
    latent_br = (flags.cumsum(1) - 1).clamp(min=0)  # flag 0 makes patch 0, flag 1 closes it
    counts = tuple(flags.sum(1).tolist())
    ends = torch.zeros(len(counts), max(counts), dtype=torch.long, device=device)
    row, place = flags.nonzero(as_tuple=True)
    ends[row, latent_br[row, place]] = place + 1
    starts = torch.cat((torch.zeros_like(ends[:, :1]), ends[:, :-1]), dim=1)
    sizes = (ends - starts).clamp(min=0)
    return Patches(starts * (sizes > 0), sizes, counts), latent_br


def part_dtype(
    kind: str, dtype: torch.dtype, scorer_dtype: torch.dtype | None = None
) -> torch.dtype:
    """The dtype of a part in a model that runs in ``dtype``.

    A patcher stays in float32 at least, since its flags must be those that it was calibrated for,
    unless a dtype is asked for it: ``scorer_dtype``.
    """
    if kind == "patcher" and scorer_dtype is not None:
        return scorer_dtype
    narrow = torch.finfo(dtype).bits < torch.finfo(torch.float32).bits
    return torch.float32 if kind == "patcher" and narrow else dtype


def _first(part: nn.Module) -> list[Tensor]:
    """The first parameter, if there is one."""
    return list(islice(part.parameters(), 1))


def _size(part: object) -> int:
    return sum(p.numel() for p in part.parameters()) if isinstance(part, nn.Module) else 0
