"""The planted bugs, of all files of this name."""

from .fault_list_bias import OF_BIAS
from .fault_list_copies import OF_COPIES
from .fault_list_distributed import OF_SEVERAL_PROCESSES
from .fault_list_gpu import OF_PIPELINES
from .fault_list_one_pass import OF_ONE_PASS
from .fault_list_packed import OF_PACKED_SEQUENCES
from .fault_list_partial import OF_PARTIAL
from .fault_list_persistent import OF_PERSISTENT
from .fault_list_portable import OF_KERNELS
from .fault_list_replay import OF_REPLAY
from .fault_list_scaling import OF_HIGH, OF_SCALING
from .fault_list_situations import OF_SITUATIONS
from .fault_list_tiled import OF_TILED
from .fault_list_wide import OF_WIDE
from .fault_list_wiring import OF_WIRING

FAULTS = (
    *OF_KERNELS, *OF_PIPELINES, *OF_ONE_PASS, *OF_WIDE, *OF_PERSISTENT, *OF_SCALING, *OF_HIGH, *OF_REPLAY, *OF_TILED,
    *OF_WIRING,
    *OF_SITUATIONS, *OF_SEVERAL_PROCESSES, *OF_PACKED_SEQUENCES, *OF_PARTIAL, *OF_BIAS, *OF_COPIES,
)  # fmt: skip
