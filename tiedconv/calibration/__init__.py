"""Block-wise calibration without labels: a tied model is fitted to its original on a few images."""

from __future__ import annotations

from tiedconv.calibration.agreement import Agreement, measure_agreement
from tiedconv.calibration.blockwise import fit_blocks
from tiedconv.calibration.config import EFFORTS, CalibConfig, Effort
from tiedconv.calibration.events import (
    BlockwiseResult,
    CalibEvent,
    Fitted,
    Fitting,
    Joint,
    OnCalibEvent,
    SpanResult,
)
from tiedconv.calibration.kfac_statistics import KfacStatistics, gather_statistics

__all__ = [
    "EFFORTS",
    "Agreement",
    "BlockwiseResult",
    "CalibConfig",
    "CalibEvent",
    "Effort",
    "Fitted",
    "Fitting",
    "Joint",
    "KfacStatistics",
    "OnCalibEvent",
    "SpanResult",
    "fit_blocks",
    "gather_statistics",
    "measure_agreement",
]
