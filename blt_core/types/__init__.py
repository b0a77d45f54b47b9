"""Values that the parts of a byte-latent model and the decode engine hand to each other.

Shape legend (a suffix names the axes): b batch rows, r new byte rows, m patches, n blocks,
B bytes of a block, k draft bytes, V ids, D a width. Rows of a batch are *ragged*: row b uses the
first ``lengths[b]`` of the r places; the rest is padding that nobody reads.

Host values (lengths, positions, counts) are Python integers, so that bookkeeping never waits for
a device; only what a kernel reads is a tensor. Importing this imports no torch: configs and the
command line use these values too.
"""

from blt_core.types.cost import GIGABYTES, Cost, Parameters, Passes, Shape, Shapes
from blt_core.types.decoding import (
    AcceptanceLaw,
    Draft,
    OpenBlock,
    Round,
    RoundCounts,
    StopRule,
    matches,
)
from blt_core.types.ids import IdScheme
from blt_core.types.rows import Blocks, DecoderOutput, Latents, Output, Patches, Rows
from blt_core.types.sampling import FREE_STREAM, Draws, Sampling, seed_of_prompt, seed_of_sample
from blt_core.types.training import StateBytes, StateMemory

__all__ = [
    "FREE_STREAM",
    "GIGABYTES",
    "AcceptanceLaw",
    "Blocks",
    "Cost",
    "DecoderOutput",
    "Draft",
    "Draws",
    "IdScheme",
    "Latents",
    "OpenBlock",
    "Output",
    "Parameters",
    "Passes",
    "Patches",
    "Round",
    "RoundCounts",
    "Rows",
    "Sampling",
    "Shape",
    "Shapes",
    "StateBytes",
    "StateMemory",
    "StopRule",
    "matches",
    "seed_of_prompt",
    "seed_of_sample",
]
