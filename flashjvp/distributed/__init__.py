"""Attention, with its JVP and a backward pass through both, of one sequence on several processes (context parallel).

DESIGN. A user divides the rows of a sequence over processes once, by a `Sharding` (a ring, Ulysses, or both), and
calls `attention` or `attention_jvp` with the rows that a process has. Everything else of a network, which works on rows
alone, stays as it is. This package is no part of `import flashjvp`.

A ring, or Ulysses, is a backend (backends/): four functions of tensors, built on a backend for one device. So the
operators, derivatives, fake rules and checks of dispatch/ serve it as they are: reverse mode, func.jvp, dual tensors,
vmap, torch.compile (which sees one operator without side effects), activation checkpointing. The name of the backend
says how the sequence is divided, so that it is part of what an operator takes.

    attention.py   the public functions and their checks       dtensor.py     DTensors as their parts
    sharding.py    who has which rows; shard and unshard       gather.py      all rows, and the gradient of that
    ring.py        keys pass from rank to rank                 merge.py       partial results and gradients, merged
    ulysses.py     rows in exchange for heads                  exchange.py    to heads and back
    positions.py, heads.py   the arithmetic of both            messages.py    what is sent; local.py: one device
"""

from .attention import attention, attention_jvp
from .sharding import Sharding

__all__ = ["Sharding", "attention", "attention_jvp"]
