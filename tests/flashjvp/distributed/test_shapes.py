"""Any lengths, heads and degrees: threads stand for processes, and results are those of one process to rounding."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

import flashjvp
from flashjvp.distributed import Sharding, attention, attention_jvp
from flashjvp.distributed.heads import pieces, shares
from flashjvp.distributed.messages import Group, Wait
from flashjvp.distributed.positions import Spans, blocks, chunks, part, shards, size
from flashjvp.distributed.ring import Ring
from tests.flashjvp.distributed import works
from tests.flashjvp.distributed.works import OF_KEYS, Call
from verify.budget.tolerance import assert_within
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.checks.distributed import LAYOUTS, Divided, Layout, over_threads
from verify.checks.distributed import blocks as divided_blocks

sizes = st.integers(0, 40)
ranks = st.integers(1, 6)


def dense(queries: list[int], keys: list[int], is_causal: bool) -> set[tuple[int, int]]:
    return {(m, n) for m in queries for n in keys if n <= m or not is_causal}


@given(length=sizes, parts=ranks)
def test_chunks_are_those_of_torch(length: int, parts: int) -> None:
    of_torch = [x.tolist() for x in torch.arange(length).chunk(parts)] if length else []
    found = [list(chunk) for chunk in chunks(length, parts)]
    assert found[: len(of_torch)] == of_torch
    assert not any(found[len(of_torch) :])


@given(length=sizes, number=ranks, zigzag=st.booleans(), parts=ranks)
def test_every_position_is_held_once(length: int, number: int, zigzag: bool, parts: int) -> None:
    held = [
        position
        for shard in shards(length, number, zigzag)
        for rows in chunks(size(shard), parts)
        for span in part(shard, rows)
        for position in span
    ]
    assert sorted(held) == list(range(length))


@given(queries=sizes, keys=sizes, number=ranks, zigzag=st.booleans(), is_causal=st.booleans())
def test_blocks_cover_what_attention_sees_once(
    queries: int, keys: int, number: int, zigzag: bool, is_causal: bool
) -> None:
    found = []
    for rows in shards(queries, number, zigzag):
        for columns in shards(keys, number, zigzag):
            m, n = ([position for span in spans for position in span] for spans in (rows, columns))
            for block in blocks(rows, columns, is_causal):
                inner_m, inner_n = m[block.rows], n[block.keys]
                assert inner_m and inner_n
                seen = dense(list(range(len(inner_m))), list(range(len(inner_n))), block.is_causal)
                found += [(inner_m[i], inner_n[j]) for i, j in seen]
    assert len(found) == len(set(found))
    assert set(found) == dense(list(range(queries)), list(range(keys)), is_causal)


@pytest.mark.parametrize("number", [2, 3, 8])
def test_zigzag_gives_all_ranks_the_same_work(number: int) -> None:
    whole = shards(32 * number, number, zigzag=True)

    def work(rows: Spans) -> int:
        found = [block for columns in whole for block in blocks(rows, columns, is_causal=True)]
        assert len(found) == number  # one call a step
        return sum(m + 1 for span in rows for m in span)

    assert len({work(rows) for rows in whole}) == 1


@given(kv_heads=st.integers(1, 5), group=st.integers(1, 5), number=ranks)
def test_pieces_of_heads_share_key_heads_evenly(kv_heads: int, group: int, number: int) -> None:
    of_queries, of_keys = shares(kv_heads * group, kv_heads, number)
    assert [head for heads in of_queries for head in heads] == list(range(kv_heads * group))
    for heads, needed in zip(of_queries, of_keys, strict=True):
        pairs = []
        for piece in pieces(heads, group):
            mine, shared = heads[piece.heads], needed[piece.kv_heads]
            ratio, rest = divmod(len(mine), len(shared))
            assert rest == 0
            pairs += [(head, shared[i // ratio]) for i, head in enumerate(mine)]
        assert pairs == [(head, head // group) for head in heads]


def divided(layout: Layout, call: Call) -> list[list[Tensor]]:
    return over_threads(layout, lambda ring, ulysses: works.divided(call, call.sharding(ring, ulysses)))


calls = st.builds(
    lambda group, kv_heads, **rest: Call(heads=group * kv_heads, kv_heads=kv_heads, **rest),
    group=st.integers(1, 3), kv_heads=st.integers(1, 3), queries=st.integers(0, 12), keys=st.integers(0, 12),
    is_causal=st.booleans(), zigzag=st.booleans(),
)  # fmt: skip


@settings(max_examples=12)
@given(call=calls, ring=st.integers(1, 4), ulysses=st.integers(1, 3))
def test_float64_results_are_those_of_one_process(call: Call, ring: int, ulysses: int) -> None:
    exact = works.whole(call)
    for results in divided(Layout(ring, ulysses, call.zigzag), call):
        for x, y in zip(results, exact, strict=True):
            torch.testing.assert_close(x, y)


HALF_CASES = (
    Case("long", q_heads=4, m=70, n=90, d=16, dv=24, is_causal=True),
    Case("short", q_heads=4, kv_heads=2, m=9, n=12, d=16, dv=8),
)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", HALF_CASES, ids=str)
@pytest.mark.parametrize("layout", [*LAYOUTS, Layout(ring=4)], ids=str)
def test_half_types_keep_the_error_budget(layout: Layout, case: Case, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, dtype)
    assert_within(inputs, Divided("tiled", layout).results(inputs), divided_blocks(layout, inputs))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_mask_of_one_row(layout: Layout) -> None:
    case = Case("padding", q_heads=2, m=20, n=30, d=8, dv=8, mask="additive", mask_shape="per_batch")
    inputs = make_inputs(case, torch.float32)
    assert_within(inputs, Divided("tiled", layout).results(inputs), divided_blocks(layout, inputs))


class Alone(Group):
    """Rank 0 of three, to which nobody answers: what it does is written down in order."""

    def __init__(self, written: list[str]) -> None:
        self.name, self.rank, self.size, self.written = "alone", 0, 3, written

    def shift(self, sent: Tensor, received: Tensor, by: int) -> Wait:
        self.written.append(f"start {by}")
        received.zero_()
        return lambda: self.written.append(f"wait {by}")


class Written:
    """A backend that writes down when it computes."""

    def __init__(self, written: list[str]) -> None:
        self.written = written

    def forward_jvp(self, q: Tensor, *rest: Any) -> Any:
        self.written.append("compute")
        return flashjvp.backends.reference.forward_jvp(q, *rest)

    def backward_jvp(self, *args: Any) -> Any:
        self.written.append("compute")
        return flashjvp.backends.reference.backward_jvp(*args)


def test_messages_are_on_their_way_while_blocks_are_computed() -> None:
    written: list[str] = []
    spans = shards(9, 3, zigzag=False)
    ring = Ring(Alone(written), spans, spans, Written(written))  # type: ignore[arg-type]
    x = torch.randn(6, 1, 2, 3, 4, dtype=torch.float64)
    o, o_t, lse, mu = ring.forward_jvp(*x, None, None, None, False, 0.5, 0.0)
    shard = ["start 1", "compute", "wait 1"]
    assert written == [*shard, *shard, "compute"]
    written.clear()
    ring.backward_jvp(o, o_t, *x, o, o_t, lse, mu, None, None, None, False, 0.5, 0.0, (True,) * 6 + (False,) * 2)
    first, second = "2", "1"  # to ranks 2 and 1, the owners of what came
    assert written == [
        *shard, "start 1", "compute", f"start {first}", "wait 1", "compute", f"start {second}", f"wait {first}",
        f"wait {second}",
    ]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_unshard_is_the_inverse_of_shard_and_its_gradient_a_sum(layout: Layout) -> None:
    whole = torch.randn(3, 13, dtype=torch.float64)
    factors = torch.randn(layout.ring * layout.ulysses, 3, 13, dtype=torch.float64)

    def of_one(ring: Group, ulysses: Group) -> tuple[Tensor, Tensor, Tensor]:
        sharding = Sharding(13, ring=ring, ulysses=ulysses, zigzag=layout.zigzag)
        own = sharding.shard(whole, 1).requires_grad_()
        assert torch.equal(own, whole[:, sharding.positions()])
        found = sharding.unshard(own, 1)
        mine = factors[ring.rank * ulysses.size + ulysses.rank]
        (grad,) = torch.autograd.grad(found, own, mine)
        return found.detach(), grad, sharding.shard(factors.sum(0), 1)

    for found, grad, expected in over_threads(layout, of_one):
        assert torch.equal(found, whole)
        torch.testing.assert_close(grad, expected)


def test_under_vmap() -> None:
    x = torch.randn(6, 3, 2, 8, 4, dtype=torch.float64)
    o, o_t = flashjvp.attention_jvp(*x)

    def of_one(ring: Group, ulysses: Group) -> tuple[Tensor, Tensor]:
        sharding = Sharding(8, ring=ring)
        parts = [sharding.shard(y, -2) for y in x]
        found = vmap(lambda *y: attention_jvp(*y, sharding))(*parts)
        return tuple(sharding.unshard(y, -2) for y in found)

    for found in over_threads(Layout(ring=2), of_one):
        torch.testing.assert_close(found, (o, o_t))


def test_plain_attention_and_its_gradients() -> None:
    call = Call(is_causal=True, zigzag=True)
    (q, k, v, *_), (G, _) = call.tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = flashjvp.attention(*leaves, **call.options)
    exact = [o, *torch.autograd.grad(o, leaves, G)]

    def of_one(ring: Group, ulysses: Group) -> list[Tensor]:
        sharding = call.sharding(ring, ulysses)
        own = [sharding.shard(x.detach(), -2, keys).requires_grad_() for x, keys in zip(leaves, OF_KEYS, strict=False)]
        o = attention(*own, sharding, **call.options)
        found = [o, *torch.autograd.grad(o, own, sharding.shard(G, -2))]
        return [sharding.unshard(x.detach(), -2, keys) for x, keys in zip(found, (False, *OF_KEYS[:3]), strict=True)]

    for layout in LAYOUTS:
        for found in over_threads(layout._replace(zigzag=True), of_one):
            torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("wanted", [(0,), (1,), (4, 5), (3,), (0, 2, 4)], ids=str)
def test_gradients_of_some_inputs(wanted: tuple[int, ...]) -> None:
    """Only what is wanted is computed and sent."""
    call = Call(is_causal=True)
    exact = [x for i, x in enumerate(works.whole(call)[2:]) if i in wanted]

    def of_one(ring: Group, ulysses: Group) -> list[Tensor]:
        sharding = call.sharding(ring, ulysses)
        tensors, (G, T) = call.tensors()
        own = [sharding.shard(x, -2, keys).clone() for x, keys in zip(tensors, OF_KEYS, strict=True)]
        leaves = [own[i].requires_grad_() for i in wanted]
        outputs = attention_jvp(*own, sharding, **call.options)
        grads = torch.autograd.grad(outputs, leaves, [sharding.shard(G, -2), sharding.shard(T, -2)])
        return [sharding.unshard(x, -2, OF_KEYS[i]) for x, i in zip(grads, wanted, strict=True)]

    for layout in LAYOUTS:
        for found in over_threads(layout._replace(zigzag=False), of_one):
            torch.testing.assert_close(found, exact)


def test_one_head_without_batch_dims() -> None:
    x = torch.randn(6, 7, 4, dtype=torch.float64)
    exact = flashjvp.attention_jvp(*x)

    def of_one(ring: Group, ulysses: Group) -> list[Tensor]:
        sharding = Sharding(7, ring=ring, ulysses=ulysses)
        found = attention_jvp(*[sharding.shard(y, 0) for y in x], sharding)
        return [sharding.unshard(y, 0) for y in found]

    for layout in LAYOUTS:
        for found in over_threads(layout, of_one):
            torch.testing.assert_close(tuple(found), exact)


def test_a_copy_of_a_network_keeps_its_sharding() -> None:
    sharding = Sharding(8, ring=Alone([]))
    assert copy.deepcopy({"sharding": sharding})["sharding"] is sharding
