"""Run as a program: which derivatives are wrong, and which errors are missing, without one private name of PyTorch.

    python -m tests.flashjvp.dispatch.removed_names PATH ...

prints a line of JSON, {path: what failed}. Each path is removed in a process of its own, a fork of this one, which has
not imported flashjvp.
"""

import json
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._decomp.decompositions_for_jvp  # what the first JVP would load in each fork
import torch._dynamo
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

SOURCE = Path(__file__).resolve().parents[3] / "flashjvp" / "_torch" / "__init__.py"
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def main(paths: list[str]) -> None:
    torch.set_num_threads(1)
    print(json.dumps({path: in_a_fork(path) for path in paths}))


def in_a_fork(path: str) -> list[str]:
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            found = failures(path)
        except BaseException as error:
            found = [f"{type(error).__name__}: {error}"]
        os.write(write, json.dumps(found).encode()[:60_000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        return list(json.loads(pipe.read()))


def failures(path: str) -> list[str]:
    remove(path)
    import flashjvp

    torch.manual_seed(0)
    x = [torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(6)]

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashjvp.attention(q, k, v, backend="tiled")

    found = []
    for name, case in RIGHT.items():
        for _ in range(3):  # calls like earlier ones take other ways
            try:
                torch.testing.assert_close(case(attention, *x), case(dense, *x))
            except Exception as error:
                found.append(f"{name}: {type(error).__name__} {error}")
                break
    table = torch.zeros(5, 5, dtype=torch.float64, requires_grad=True)
    refused: dict[str, tuple[type[Exception], Callable[[], Any]]] = {
        "hessian": (flashjvp.SecondOrderError, lambda: hessian(lambda q: attention(q, *x[1:3]).sum())(x[0])),
        "grad of grad": (
            flashjvp.SecondOrderError,
            lambda: grad(lambda q: grad(lambda q: attention(q, *x[1:3]).sin().sum())(q).sum())(x[0]),
        ),
        "second tangent of a mask": (
            flashjvp.SecondOrderError,
            lambda: hessian(lambda mask: flashjvp.attention(*x[:3], mask).sin().sum())(table.detach()),
        ),
    }
    for name, (error_type, call) in refused.items():
        try:
            call()
            found.append(f"{name}: no error")
        except error_type:
            pass
    return found


def remove(path: str) -> None:
    """Loads flashjvp._torch from source in which the name is one that PyTorch never had."""
    source = SOURCE.read_text()
    if path:
        assert f'"{path}' in source, path
        source = source.replace(f'"{path}', f'"{path}_gone')
    module = types.ModuleType("flashjvp._torch")
    module.__path__ = [str(SOURCE.parent)]
    sys.modules["flashjvp._torch"] = module
    exec(compile(source, str(SOURCE), "exec"), module.__dict__)
    import flashjvp

    flashjvp._torch = module  # type: ignore[attr-defined]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def reverse(f: Attention, *x: Tensor) -> Any:
    leaves = [y.clone().requires_grad_() for y in x[:3]]
    return torch.autograd.grad(f(*leaves).sin().sum(), leaves)


def reverse_over_forward(f: Attention, *x: Tensor) -> Any:
    leaves = [y.clone().requires_grad_() for y in x]
    o, o_t = jvp(f, tuple(leaves[:3]), tuple(leaves[3:]))
    return torch.autograd.grad(o.sin().sum() + o_t.cos().sum(), leaves)


def dual_level(f: Attention, *x: Tensor) -> Any:
    with forward_ad.dual_level():
        pairs = zip(x[:3], x[3:], strict=True)
        return forward_ad.unpack_dual(f(*(forward_ad.make_dual(y, y_t) for y, y_t in pairs))).tangent


def jvp_of(f: Attention) -> Callable[..., Any]:
    return lambda *x: jvp(f, x[:3], x[3:])


def grad_over_jvp(f: Attention, *x: Tensor) -> Any:
    def loss(q: Tensor, q_t: Tensor) -> Tensor:
        o, o_t = jvp(f, (q, x[1], x[2]), (q_t, x[4], x[5]))
        return o.cos().sum() + o_t.sin().sum()

    return grad(loss, (0, 1))(x[0], x[3])


RIGHT: dict[str, Callable[..., Any]] = {
    "reverse": reverse,
    "reverse over forward": reverse_over_forward,
    "dual level": dual_level,
    "func.jvp": lambda f, *x: jvp(f, x[:3], x[3:]),
    "func.grad": lambda f, *x: grad(lambda q: f(q, *x[1:3]).sin().sum())(x[0]),
    "grad over jvp": grad_over_jvp,
    "jacrev": lambda f, *x: jacrev(lambda q: f(q, *x[1:3]))(x[0]),
    "jacfwd": lambda f, *x: jacfwd(lambda q: f(q, *x[1:3]))(x[0]),
    "vmap of a vjp": lambda f, *x: vmap(vjp(lambda q: f(q, *x[1:3]), x[0])[1])(torch.stack(x[3:])),
    "func.jvp in a compiled function": lambda f, *x: torch.compile(jvp_of(f), backend="eager")(*x),
    "vmap": lambda f, *x: vmap(f, in_dims=(0, None, None))(x[0], x[1][0], x[2][0]),
}

if __name__ == "__main__":
    main(sys.argv[1:])
