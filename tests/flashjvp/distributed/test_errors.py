"""What is not served raises a typed error, before anything is sent: threads that nobody answers stand for processes."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.func import jvp

import flashjvp
from flashjvp import ArgumentTypeError, ArgumentValueError, SecondOrderError, UnsupportedError
from flashjvp.distributed import Sharding, attention, attention_jvp
from flashjvp.distributed.messages import Group
from tests.flashjvp.distributed import works
from tests.flashjvp.distributed.ranks import Ranks
from tests.flashjvp.distributed.works import Call


class Silent(Group):
    """The first of some ranks. What would be sent is an error."""

    def __init__(self, size: int) -> None:
        self.name, self.rank, self.size = "silent", 0, size


RING, ULYSSES = Sharding(8, ring=Silent(2)), Sharding(8, ulysses=Silent(2))
q = torch.randn(1, 2, 4, 8)
bias = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (ArgumentTypeError, "sharding: expected a flashjvp.distributed.Sharding, got", lambda: attention(q, q, q)),
        (ArgumentTypeError, "sharding: expected", lambda: attention(q, q, q, 3)),
        (ArgumentValueError, "q: expected 4 rows, those of this process", lambda: attention(q[..., :3, :], q, q, RING)),
        (ArgumentValueError, "k: expected 4 rows", lambda: attention(q, q[..., :3, :], q[..., :3, :], RING)),
        (ArgumentValueError, "v: expected as many rows as k", lambda: attention(q, q, q[..., :3, :], RING)),
        (ArgumentTypeError, "k: expected the dtype of q", lambda: attention(q, q.double(), q, RING)),
        (ArgumentValueError, "q_t: expected the shape", lambda: attention_jvp(q, q, q, q[..., :3], sharding=RING)),
        (ArgumentValueError, "backend: expected None or", lambda: attention(q, q, q, RING, backend="ring")),
        (ArgumentValueError, "attn_mask: expected a shape", lambda: attention(q, q, q, RING, attn_mask=bias[:, :4])),
        (
            UnsupportedError, "attn_mask: expected one without gradient",
            lambda: attention(q, q, q, RING, attn_mask=bias.clone().requires_grad_()),
        ),
        (
            UnsupportedError, "attn_mask: expected one without gradient and tangent",
            lambda: jvp(lambda x: attention(q, q, q, RING, attn_mask=x), (bias,), (bias,)),
        ),
        (UnsupportedError, "attn_mask: expected one row", lambda: attention(q, q, q, ULYSSES, attn_mask=bias)),
        (ArgumentTypeError, "is_causal: expected a bool", lambda: attention(q, q, q, RING, is_causal=1)),
        (ArgumentTypeError, "length: expected an integer", lambda: Sharding(8.0)),
        (ArgumentTypeError, "key_length: expected an integer", lambda: Sharding(8, key_length=True)),
        (ArgumentValueError, "length: expected a number of rows", lambda: Sharding(-1)),
        (ArgumentTypeError, "zigzag: expected a bool", lambda: Sharding(8, zigzag=1)),
        (ArgumentTypeError, "ring: expected a DeviceMesh or a ProcessGroup", lambda: Sharding(8, ring="cp")),
        (ArgumentTypeError, "ulysses: expected a DeviceMesh", lambda: Sharding(8, ulysses=2)),
        (ArgumentValueError, "x: expected 4 rows along dim 2", lambda: RING.unshard(q[..., :3, :], 2)),
        (ArgumentValueError, "x: expected 8 rows along dim -2", lambda: RING.shard(q, -2)),
        (ArgumentValueError, "dim: expected a dim of x", lambda: RING.shard(q, 4)),
        (ArgumentTypeError, "x: expected a tensor", lambda: RING.shard([1], 0)),
    ],
)  # fmt: skip
def test_bad_calls(error: type[Exception], words: str, call: Any) -> None:
    with pytest.raises(error, match=f"^{words}"):
        call()


def test_the_names_of_composed_backends_are_not_public() -> None:
    with pytest.raises(ArgumentValueError, match=r"^backend: expected None or one of"):
        flashjvp.attention(q, q, q, backend=RING.of_backend(None))


def second_derivatives(group: dist.ProcessGroup) -> list[str]:
    """Every rank raises, and none waits for another."""
    call = Call()
    sharding = call.sharding(ring=group)
    tensors, _ = call.tensors()
    leaves = [sharding.shard(x, -2, keys).requires_grad_() for x, keys in zip(tensors, works.OF_KEYS, strict=True)]

    def gradient(q: torch.Tensor) -> torch.Tensor:
        o, o_t = attention_jvp(q, *leaves[1:], sharding, **call.options)
        return torch.autograd.grad(o.sum() + o_t.sum(), q, create_graph=True)[0]

    said = []
    for work in (
        lambda: torch.autograd.grad(gradient(leaves[0]).sum(), leaves[0]),
        lambda: jvp(lambda x: attention_jvp(x, *leaves[1:], sharding, **call.options)[1], (leaves[0],), (leaves[0],)),
    ):
        try:
            work()
        except SecondOrderError as error:
            said.append(str(error))
    return said


def test_second_derivatives(ranks: Ranks) -> None:
    for said in ranks.run(2, second_derivatives):
        assert len(said) == 2


def bad_dtensors(_: dist.ProcessGroup) -> list[str]:
    """What each of some calls says."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    x = torch.randn(1, 2, 4, 8)

    def of(*placements: Any, like: torch.Tensor = x) -> DTensor:
        return DTensor.from_local(like, mesh, placements, run_check=False)

    heads = [Shard(1), Shard(0)]
    uneven, one_head = (distribute_tensor(torch.randn(2, n, 4, 8), mesh, heads) for n in (3, 1))
    rows, both = of(Shard(2), Shard(0)), of(Shard(2), Shard(2))
    calls: list[tuple[type[Exception], Any]] = [
        (ArgumentTypeError, lambda: attention(rows, x, rows)),
        (ArgumentTypeError, lambda: attention(x, x, rows)),
        (ArgumentValueError, lambda: attention(rows, rows, rows, Sharding(8))),
        (UnsupportedError, lambda: attention(rows, both, both)),
        (UnsupportedError, lambda: attention(both, both, both)),
        (UnsupportedError, lambda: attention(of(Shard(3), Shard(0)), of(Shard(3), Shard(0)), of(Shard(3), Shard(0)))),
        (UnsupportedError, lambda: attention(*[of(Partial(), Shard(0))] * 3)),
        (UnsupportedError, lambda: attention(rows, rows, rows, attn_mask=bias)),
        (UnsupportedError, lambda: flashjvp.attention(rows, rows, rows)),
        (ArgumentValueError, lambda: Sharding(8, ring=mesh)),
        (UnsupportedError, lambda: attention(uneven, *[one_head] * 2, enable_gqa=True)),
        (UnsupportedError, lambda: attention(rows, *[of(Shard(2), Shard(0), like=x[0])] * 2)),
    ]  # fmt: skip
    said = []
    for kind, call in calls:
        try:
            call()
            said.append("nothing")
        except kind as error:
            said.append(str(error))
    return said


def test_dtensors_that_are_not_served(ranks: Ranks) -> None:
    for said in ranks.run(4, bad_dtensors):
        assert all(": expected " in words for words in said), said


def dual_mask(group: dist.ProcessGroup) -> str:
    """A float mask with a tangent of a dual level."""
    sharding = Sharding(8, ring=group)
    with forward_ad.dual_level():
        try:
            attention(q, q, q, sharding, attn_mask=forward_ad.make_dual(bias, bias))
        except UnsupportedError as error:
            return str(error)
    return "nothing"


def test_a_mask_with_a_tangent(ranks: Ranks) -> None:
    assert all(words.startswith("attn_mask: expected one without") for words in ranks.run(2, dual_mask))
