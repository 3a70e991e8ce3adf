"""How long the layers of a model take on this machine: as they are, and with factors of any rank.

`measure_times` turns the multiply-adds of a model (`core.workload`) into nanoseconds, which a
budget can limit in the same way; `time_of_plan` tells how long a whole model of a plan takes, by
which `corrected` scales them. Runtimes are the files of `timing.runtimes`.
"""

from tiedconv.timing.runtimes import all_runtimes, choose_runtime
from tiedconv.timing.table import Rehearsed, TimeTable, corrected, measure_times
from tiedconv.timing.whole_plan import time_of_plan

__all__ = [
    "Rehearsed", "TimeTable", "all_runtimes", "choose_runtime", "corrected", "measure_times",
    "time_of_plan",
]  # fmt: skip
