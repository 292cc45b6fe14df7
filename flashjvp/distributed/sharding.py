"""How a sequence is divided over processes: `Sharding`, which also builds the backend that computes over them."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..backends import select
from ..errors import ArgumentTypeError, ArgumentValueError
from . import gather
from .local import Local
from .messages import Group
from .positions import Spans, chunks, part, shards, size
from .ring import Ring
from .ulysses import Ulysses

Processes = DeviceMesh | dist.ProcessGroup | Group | None


class Places:
    """Which positions of one sequence each process holds."""

    def __init__(self, length: int, ring: Group | None, ulysses: Group | None, zigzag: bool) -> None:
        self.length = length
        self.of_ring = shards(length, ring.size if ring else 1, zigzag)
        shard = self.of_ring[ring.rank if ring else 0]
        self.of_ulysses: list[Spans] = [(rows,) for rows in chunks(size(shard), ulysses.size if ulysses else 1)]
        self.own = part(shard, *self.of_ulysses[ulysses.rank if ulysses else 0])
        self.rows = size(self.own)


@dataclass(frozen=True, eq=False)
class Sharding:
    """How a sequence is divided over the processes of a ring, of Ulysses, or of both; made once, on every process.

    With R processes in the ring and U in Ulysses, a sequence of L rows is cut into R shards, and each of these into U
    parts, as `torch.chunk` and DTensor's `Shard` cut: L need not divide evenly, and a part may be empty. A process
    holds the rows of its part, in their order. On a two-dimensional mesh::

        mesh = init_device_mesh("cuda", (R, U), mesh_dim_names=("ring", "ulysses"))
        sharding = Sharding(L, ring=mesh["ring"], ulysses=mesh["ulysses"], zigzag=True)

    length: L, the rows of the whole sequence of queries.
    ring: the processes that pass keys and values on, a one-dimensional DeviceMesh or a ProcessGroup; None = no ring.
    ulysses: the processes that exchange rows for heads (which need not divide evenly), likewise.
    key_length: the rows of the whole sequence of keys and values, divided likewise; None = length.
    zigzag: whether a process of the ring holds an early and a late chunk of 2 R, so that all have the same work in
        causal attention. Its rows are then two runs of positions.

    Methods: `shard(x, dim)` gives this process's rows of a whole tensor, `unshard(x, dim)` all rows of one that is
    divided, `positions()` where this process's rows are; with `keys=True` for the sequence of keys.

    Raises:
        ArgumentTypeError: for processes that are no mesh or group, a length that is no integer, a zigzag that is no
            bool.
        ArgumentValueError: for a mesh of more than one dim, a group without this process, a negative length.
    """

    length: int
    ring: Processes = None
    ulysses: Processes = None
    key_length: int | None = None
    zigzag: bool = False
    _groups: tuple[Group | None, Group | None] = field(init=False, repr=False)
    _places: tuple[Places, Places] = field(init=False, repr=False)
    _backends: dict[str | None, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lengths = [_length("length", self.length)]
        lengths.append(lengths[0] if self.key_length is None else _length("key_length", self.key_length))
        if not isinstance(self.zigzag, bool):
            raise ArgumentTypeError(f"zigzag: expected a bool, got an object of type {type(self.zigzag).__name__}")
        groups = _group("ring", self.ring), _group("ulysses", self.ulysses)
        places = tuple(Places(length, *groups, self.zigzag) for length in lengths)
        words = [f"{group.name}: {group.rank} of {group.size}" if group else "none" for group in groups]
        name = f"{lengths} rows, ring {words[0]}, ulysses {words[1]}, zigzag {self.zigzag}, on "
        backends: dict[str | None, str] = {of: f"{name}{of}" for of in (None, *select.NAMES)}
        for of, composed in backends.items():
            select.COMPOSED[composed] = _backend(of, *groups, *places)
        for attribute, value in (("_groups", groups), ("_places", places), ("_backends", backends)):
            object.__setattr__(self, attribute, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sharding":
        """The same one: a copy of a network has the same processes."""
        return self

    def positions(self, keys: bool = False) -> Tensor:
        """The positions of this process's rows in the whole sequence (of queries, or of keys): int64 [rows], CPU."""
        own = self._places[keys].own
        return torch.tensor([position for span in own for position in span], dtype=torch.int64)

    def shard(self, x: Tensor, dim: int, keys: bool = False) -> Tensor:
        """This process's rows of a tensor that has all of them along a dim.

        Its gradient is that of these rows, and zero for others, so that the sum over processes is the whole gradient.
        """
        places = self._places[keys]
        _check_rows(x, dim, places.length)
        spans = [x.narrow(dim, span.start, len(span)) for span in places.own]
        return torch.cat(spans, dim) if len(spans) > 1 else spans[0] if spans else x.narrow(dim, 0, 0)

    def unshard(self, x: Tensor, dim: int, keys: bool = False) -> Tensor:
        """All rows of a tensor of which each process has its own along a dim: the same on every process.

        Differentiable in both modes. In reverse mode the gradient of a row is the sum over processes of what reached
        their copies of it: it is that of the sum of all processes' losses, as DistributedDataParallel and FSDP have it.
        """
        places, (ring, ulysses) = self._places[keys], self._groups
        _check_rows(x, dim, places.rows)
        x = x.movedim(dim, 0)
        for group, spans in ((ulysses, places.of_ulysses), (ring, places.of_ring)):
            x = x if group is None else gather.gathered(x, group, spans)
        return x.movedim(0, dim)

    def of_backend(self, name: str | None) -> str:
        """The name of the backend that computes over these processes, with backend `name` on each."""
        return self._backends[name]

    @property
    def rows(self) -> tuple[int, int]:
        """How many queries and keys this process holds."""
        queries, keys = self._places
        return queries.rows, keys.rows

    @property
    def keys(self) -> int:
        """How many keys there are in all."""
        return self._places[1].length

    @property
    def has_ulysses(self) -> bool:
        """Whether there are several processes that exchange rows for heads."""
        _, ulysses = self._groups
        return ulysses is not None and ulysses.size > 1


def _backend(name: str | None, ring: Group | None, ulysses: Group | None, queries: Places, keys: Places) -> Any:
    """Local attention, in the ring's hands, in Ulysses' hands."""
    backend: Any = Local(name)
    if ring is not None and ring.size > 1:
        backend = Ring(ring, queries.of_ring, keys.of_ring, backend)
    if ulysses is not None and ulysses.size > 1:
        backend = Ulysses(ulysses, [size(x) for x in queries.of_ulysses], [size(x) for x in keys.of_ulysses], backend)
    return backend


def _group(name: str, processes: object) -> Group | None:
    if processes is None or isinstance(processes, Group):
        return processes
    if isinstance(processes, DeviceMesh):
        if processes.ndim != 1:
            raise ArgumentValueError(f"{name}: expected a mesh of one dim, such as mesh[{name!r}], got {processes}")
        processes = processes.get_group()
    if not isinstance(processes, dist.ProcessGroup):
        kind = type(processes).__name__
        raise ArgumentTypeError(f"{name}: expected a DeviceMesh or a ProcessGroup, got an object of type {kind}")
    group = Group(processes)
    if group.rank < 0:
        raise ArgumentValueError(f"{name}: expected a group of which this process is one, got one without it")
    return group


def _length(name: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentTypeError(f"{name}: expected an integer, got an object of type {type(value).__name__}")
    if value < 0:
        raise ArgumentValueError(f"{name}: expected a number of rows, got {value}")
    return value


def _check_rows(x: object, dim: int, rows: int) -> None:
    if not isinstance(x, Tensor):
        raise ArgumentTypeError(f"x: expected a tensor, got an object of type {type(x).__name__}")
    if not -x.ndim <= dim < x.ndim:
        raise ArgumentValueError(f"dim: expected a dim of x, of shape {list(x.shape)}, got {dim}")
    if x.shape[dim] != rows:
        raise ArgumentValueError(f"x: expected {rows} rows along dim {dim}, got shape {list(x.shape)}")
