"""How long the layers of a model take on this machine: as they are, and with factors of any rank.

`measure_times` turns the multiply-adds of a model (`core.workload`) into nanoseconds, which a
budget can limit in the same way. Runtimes are the files of `timing.runtimes`.
"""

from tiedconv.timing.runtimes import all_runtimes, choose_runtime
from tiedconv.timing.table import TimeTable, measure_times

__all__ = ["TimeTable", "all_runtimes", "choose_runtime", "measure_times"]
