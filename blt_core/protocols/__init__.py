"""The contracts between the core and its plugins: one small protocol a kind.

Shapes use the legend of :mod:`blt_core.types`: b batch rows, r new byte rows, m patches, n blocks,
B block bytes, k draft bytes, V ids, D widths. Batch rows are ragged; row b uses ``lengths[b]``
places and the rest is padding whose content is unspecified and never read.

Model parts take a cache or None. With a cache the given rows continue it; with None they are the
whole sequence from BOS on. Both must give the same numbers: that is what
:mod:`blt_core.testing` checks.
"""

from blt_core.protocols.decoding import (
    CostModel,
    DecodeOps,
    Drafter,
    Sampler,
    StoppingDrafter,
    Unmasking,
    Verification,
)
from blt_core.protocols.files import (
    CheckpointFormat,
    Corpus,
    Documents,
    PatchedDocuments,
    ScatteredDocuments,
    WeightedDocuments,
)
from blt_core.protocols.parts import (
    MODEL_KINDS,
    ByteScorer,
    Cache,
    CacheT,
    Decoder,
    DecoderCache,
    Encoder,
    GlobalModel,
    Patcher,
    ReorderingCache,
    ThresholdPatcher,
    can_reorder,
)
from blt_core.protocols.training import (
    RESERVED_FIGURES,
    RESERVED_PREFIXES,
    UNSCORED,
    BackgroundSaver,
    MemoryPlanner,
    Objective,
    TrafficPlanner,
    TrainingBackend,
)

__all__ = [
    "MODEL_KINDS",
    "RESERVED_FIGURES",
    "RESERVED_PREFIXES",
    "UNSCORED",
    "BackgroundSaver",
    "ByteScorer",
    "Cache",
    "CacheT",
    "CheckpointFormat",
    "Corpus",
    "CostModel",
    "DecodeOps",
    "Decoder",
    "DecoderCache",
    "Documents",
    "Drafter",
    "Encoder",
    "GlobalModel",
    "MemoryPlanner",
    "Objective",
    "PatchedDocuments",
    "Patcher",
    "ReorderingCache",
    "Sampler",
    "ScatteredDocuments",
    "StoppingDrafter",
    "ThresholdPatcher",
    "TrafficPlanner",
    "TrainingBackend",
    "Unmasking",
    "Verification",
    "WeightedDocuments",
    "can_reorder",
]
