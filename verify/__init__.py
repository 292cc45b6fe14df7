"""Shows that flashjvp's results are right. `python -m verify` runs everything below.

- cases/: a case is one call of attention described as data; the list of cases, and their tensors.
- oracles/: what results are compared with: dense attention and networks in float64, and identities.
- budget/: how large an error may be. The rule is in tolerance.py, the rounding behind it in propagation.py.
- checks/: calls inside PyTorch's transforms, special masks, threads, repeated calls, and emulated GPU kernels.
- run/: `python -m verify`: the plan, the worker processes and the tables.
- model/: `verify model` and `verify published`: whole networks and their training losses.
- faults/: `verify faults`: mutation tests, which show that the checks catch planted bugs.
- emulator/: runs the kernels written for Hopper GPUs on a CPU.
- codegen/: `verify codegen`: what the kernels compile to, without a GPU.
"""

from flashjvp_commands.extras import needed_by_commands

needed_by_commands("verify", "train", "eval")
