"""What the paper prints: parameter counts of its two scales, and pass counts with their GB.

Source: Fast BLT, arXiv 2605.08044; 3B model, 512 bytes of French to English. P counts are as
printed: hash tables and the byte scorer are not in them.
"""

from __future__ import annotations

import attrs

from blt_core.types import Parameters, Passes

#: Printed parameter counts by scale.
SCALES = {
    "1b": Parameters(decoder=160_000_000, encoder=19_000_000, global_model=1_280_000_000),
    "3b": Parameters(decoder=160_000_000, encoder=26_000_000, global_model=2_820_000_000),
}


@attrs.frozen
class PrintedRow:
    """One row of the paper's table: method, passes, and the bandwidth it prints in GB."""

    method: str
    passes: Passes
    gigabytes: float


def _row(method: str, n_dec: int, n_enc: int, gigabytes: float) -> PrintedRow:
    return PrintedRow(method, Passes(decoder=n_dec, encoder=n_enc, encoder_bytes=n_enc), gigabytes)


#: The rows that print all three figures.
ROWS = (
    _row("BLT", 512, 308, 1920.99),
    _row("BLT-S k=4", 534, 215, 1395.99),
    _row("BLT-S k=8", 580, 130, 928.73),
    _row("BLT-S k=16", 724, 87, 727.17),
    _row("BLT-D-4 α=0.7", 216, 128, 797.58),
    _row("BLT-D-8 α=0.7", 179, 64, 421.51),
    _row("BLT-D-16 α=0.7", 162, 32, 233.87),
    _row("BLT-DV-8 EB γ=1.5", 251, 126, 802.07),
)
