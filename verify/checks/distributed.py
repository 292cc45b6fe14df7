"""A sequence that is divided over processes gives the results of one process. Threads stand for the processes here.

One thread runs at a time, and others go on where it waits for a message, so that a check repeats itself.
"""

import itertools
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashjvp import distributed
from flashjvp.distributed import heads, positions
from flashjvp.distributed.messages import Group, Wait

from ..budget.blocks import Block
from ..budget.tolerance import Identity
from ..cases.inputs import Inputs
from ..oracles.attention import NAMES, Results, Subject
from .against_float64 import against_float64

PATIENCE_SECONDS = 60.0


class Layout(NamedTuple):
    """How many processes pass keys on, and how many exchange rows for heads."""

    ring: int = 1
    ulysses: int = 1
    zigzag: bool = False

    def __str__(self) -> str:
        return f"ring {self.ring}{' zig-zag' * self.zigzag}, Ulysses {self.ulysses}"


LAYOUTS = (Layout(ring=3), Layout(ring=2, zigzag=True), Layout(ulysses=4), Layout(ring=2, ulysses=2, zigzag=True))


class Threads(Group):
    """A group whose ranks are threads of this process, and whose messages are copies."""

    def __init__(self, name: str, rank: int, size: int, mail: dict[tuple[int, int], Any], running: Any) -> None:
        self.name, self.rank, self.size, self._mail, self._running = name, rank, size, mail, running

    def shift(self, sent: Tensor, received: Tensor, by: int) -> Wait:
        self._send(sent, (self.rank + by) % self.size)
        source = (self.rank - by) % self.size
        return lambda: self._take(received, source)

    def swap(self, sent: Tensor, sent_sizes: list[int], received: Tensor, received_sizes: list[int]) -> None:
        for rank, part in enumerate(sent.split(sent_sizes)):
            self._send(part, rank)
        for rank, part in enumerate(received.split(received_sizes)):
            self._take(part, rank)

    def _send(self, x: Tensor, to: int) -> None:
        self._mail[self.rank, to].put(x.clone())

    def _take(self, into: Tensor, source: int) -> None:
        self._running.release()
        try:
            message = self._mail[source, self.rank].get(timeout=PATIENCE_SECONDS)
        finally:
            self._running.acquire()
        into.copy_(message)


def over_threads(layout: Layout, work: Callable[[Group, Group], Any]) -> list[Any]:
    """What `work(ring, ulysses)` returns on each of ring * ulysses ranks, in the order of shards."""
    running = threading.Lock()
    rings = [_mail(layout.ring) for _ in range(layout.ulysses)]
    exchanges = [_mail(layout.ulysses) for _ in range(layout.ring)]
    found: dict[tuple[int, int], Any] = {}
    failures: list[BaseException] = []

    def run(r: int, u: int) -> None:
        ring = Threads(f"threads, ring {u}", r, layout.ring, rings[u], running)
        ulysses = Threads(f"threads, exchange {r}", u, layout.ulysses, exchanges[r], running)
        with running:
            try:
                found[r, u] = work(ring, ulysses)
            except BaseException as error:  # raised in the thread that waits
                failures.append(error)

    ranks = list(itertools.product(range(layout.ring), range(layout.ulysses)))
    threads = [threading.Thread(target=run, args=rank, daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return [found[rank] for rank in ranks]


def _mail(size: int) -> dict[tuple[int, int], Any]:
    return {pair: queue.SimpleQueue() for pair in itertools.product(range(size), range(size))}


@dataclass(frozen=True)
class Divided(Subject):
    """A backend of flashjvp on several processes."""

    layout: Layout = LAYOUTS[0]

    def results(self, inputs: Inputs) -> Results:
        """Outputs and gradients of the whole sequence, as the first process has them."""
        return self.of_each(inputs)[0]

    def of_each(self, inputs: Inputs) -> list[Results]:
        """The same, as each process has them."""
        return over_threads(self.layout, lambda ring, ulysses: self._of_one(inputs, ring, ulysses))

    def _of_one(self, inputs: Inputs, ring: Group, ulysses: Group) -> Results:
        """What one process gets, whose outputs and gradients are put together with the others'."""
        lengths = inputs.q.shape[-2], inputs.k.shape[-2]
        sharding = distributed.Sharding(
            lengths[0], ring=ring, ulysses=ulysses, key_length=lengths[1], zigzag=self.layout.zigzag
        )

        def part(x: Tensor | None, keys: bool = False) -> Any:
            return None if x is None else sharding.shard(x, -2, keys).detach()

        given = [inputs.q, inputs.k, inputs.v, inputs.q_t, inputs.k_t, inputs.v_t]
        parts = [part(x, keys) for x, keys in zip(given, 2 * (False, True, True), strict=True)]
        leaves: list[Any] = [None if x is None else x.clone().requires_grad_() for x in parts]
        mask = inputs.mask if inputs.mask is None or inputs.mask.shape[-2] == 1 else part(inputs.mask)
        q, k, v, q_t, k_t, v_t = leaves
        o, o_t = distributed.attention_jvp(
            q, k, v, q_t, k_t, v_t, sharding, attn_mask=mask, is_causal=inputs.is_causal, scale=inputs.scale,
            enable_gqa=inputs.q.shape[-3] != inputs.k.shape[-3], backend=self.backend,
        )  # fmt: skip
        outputs: list[Any] = [o, o_t if inputs.has_tangent else None]
        grads = iter(_gradients(outputs, leaves, [part(inputs.d_o), part(inputs.d_o_t)]))
        found = [*outputs, *(None if x is None else next(grads) for x in leaves)]
        of_keys = (False, False, False, True, True, False, True, True)
        whole: list[Any] = [
            None if x is None else sharding.unshard(x.detach(), -2, keys)
            for x, keys in zip(found, of_keys, strict=True)
        ]
        return Results(*whole)


def blocks(layout: Layout, inputs: Inputs) -> list[Block]:
    """The calls of attention that the processes make between them."""
    of_queries, of_keys = (positions.shards(x.shape[-2], layout.ring, layout.zigzag) for x in (inputs.q, inputs.k))
    shares, _ = heads.shares(inputs.q.shape[-3], inputs.k.shape[-3], layout.ulysses)
    found = []
    for (rank, queries), (owner, keys) in itertools.product(enumerate(of_queries), enumerate(of_keys)):
        rows, columns = [*itertools.chain(*queries)], [*itertools.chain(*keys)]
        for block in positions.blocks(queries, keys, inputs.is_causal):
            taken = rows[block.rows], columns[block.keys]
            found += [Block(share, *taken, ulysses, rank, owner) for ulysses, share in enumerate(shares)]
    return found


def divided(inputs: Inputs, subject: Subject) -> list[Identity]:
    """All results of a sequence on several processes against float64 attention of one."""
    has_rows = inputs.mask is not None and inputs.mask.shape[-2] > 1
    found = []
    for layout in LAYOUTS:
        if layout.ulysses > 1 and has_rows:
            continue
        first, *others = Divided(subject.backend, layout).of_each(inputs)
        rows = against_float64(inputs, _Found(subject.backend, first), blocks=blocks(layout, inputs))
        found += [replace(row, quantity=f"{row.quantity}, {layout}") for row in rows]
        are_same = all(_same(getattr(first, name), getattr(other, name)) for other in others for name in NAMES)
        found.append(Identity(f"all processes, {layout}", None, None, are_same))
    return found


def _gradients(outputs: list[Any], leaves: list[Any], cotangents: list[Any]) -> list[Tensor]:
    """Of the leaves that there are, through the outputs that have a cotangent."""
    pairs = [(x, d_x) for x, d_x in zip(outputs, cotangents, strict=True) if x is not None and d_x is not None]
    present = [x for x in leaves if x is not None]
    # All backward passes of a GPU share one thread unless they are told to stay in their own: they would wait for each
    # other's messages forever.
    with torch.autograd.set_multithreading_enabled(False):
        grads = torch.autograd.grad([x for x, _ in pairs], present, [d_x for _, d_x in pairs], allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(present, grads, strict=True)]


@dataclass(frozen=True)
class _Found(Subject):
    """Results that were computed before."""

    found: Any = None

    def results(self, inputs: Inputs) -> Results:
        found: Results = self.found
        return found


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    return (x is None and y is None) or (x is not None and y is not None and torch.equal(x, y))
