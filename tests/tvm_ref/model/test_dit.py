"""The network against an independent dense implementation, differentiated by PyTorch."""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tvm_ref.model.config import DiTConfig
from tvm_ref.model.dit import DiT
from verify.budget.network_tolerance import network_budget, relative_error
from verify.oracles import network as dense
from verify.oracles.network import Weights, tiny, trained, weights_of

CONFIGS = {
    "class-conditional": tiny(),
    "unconditional": tiny(num_classes=0),
    "without guidance": tiny(guidance=False),
    "neither": tiny(num_classes=0, guidance=False),
    "layer norm": tiny(norm="layer"),
    "no qk norm, modulation eps": tiny(qk_norm=False, modulation_eps=0.3),
    "no modulation norm": tiny(modulation_norm=False),
    "as a plain DiT": tiny(norm="layer", qk_norm=False, modulation_norm=False),
    "one token": tiny(image_size=1, patch=1, channels=2),
    "other sizes": tiny(image_size=9, patch=3, channels=1, width=28, heads=1, mlp_ratio=1.5, depth=3),
}
DIRECTIONS = ("s", "t", "x", "x t", "t s")


class Call(NamedTuple):
    """Arguments of a network, tangents x_t, t_t, s_t and cotangents of F and F_t."""

    inputs: tuple[Tensor, Tensor, Tensor]
    labels: Tensor
    beta: Tensor | None
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None]
    cotangents: tuple[Tensor, Tensor]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Call":
        """Moves all numbers to another dtype and device."""

        def moved(part: Any) -> Any:
            return None if part is None else part.to(device, dtype)

        parts = (tuple(map(moved, part)) for part in (self.inputs, self.tangents, self.cotangents))
        inputs, tangents, cotangents = parts
        return Call(inputs, self.labels.to(device), moved(self.beta), tangents, cotangents)


def call(config: DiTConfig, direction: str = "x t s", batch: int = 3, seed: int = 1) -> Call:
    draw = torch.Generator().manual_seed(seed)
    shape = (batch, config.channels, config.image_size, config.image_size)
    x, x_t, d_F, d_F_t = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(4))
    t, s, t_t, s_t, beta = (torch.rand(batch, generator=draw, dtype=torch.float64) for _ in range(5))
    labels = torch.randint(config.num_classes + 1, (batch,), generator=draw)
    wanted = direction.split()
    tangents = tuple(z if name in wanted else None for name, z in (("x", x_t), ("t", t_t), ("s", s_t)))
    return Call((x, t, s), labels, beta if config.guidance else None, tangents, (d_F, d_F_t))  # type: ignore[arg-type]


def differentiated(F: Tensor, F_t: Tensor, weights: Weights, given: Call) -> list[Tensor]:
    """F, F_t and the gradients of <F, d_F> + <F_t, d_F_t> with respect to every weight."""
    product = (F * given.cotangents[0]).sum() + (F_t * given.cotangents[1]).sum()
    return [F.detach(), F_t.detach(), *torch.autograd.grad(product, list(weights.values()))]


def by_pairs(network: DiT, given: Call, **options: bool) -> list[Tensor]:
    F, F_t = network(*given.inputs, given.labels, given.beta, given.tangents, **options)
    return differentiated(F, F_t, learned(network), given)


def by_func_jvp(function: Callable[..., Tensor], weights: Weights, given: Call) -> list[Tensor]:
    zeros_for_none = tuple(
        torch.zeros_like(z) if z_t is None else z_t for z, z_t in zip(given.inputs, given.tangents, strict=True)
    )
    F, F_t = torch.func.jvp(lambda *z: function(*z, given.labels, given.beta), given.inputs, zeros_for_none)
    return differentiated(F, F_t, weights, given)


def by_dense(network: DiT, given: Call) -> list[Tensor]:
    weights = weights_of(network)
    function = lambda *arguments: dense.network(weights, network.config, *arguments)  # noqa: E731
    return by_func_jvp(function, learned(network), given)


def learned(network: DiT) -> Weights:
    return {name: p for name, p in weights_of(network).items() if p.requires_grad}


def rounded(network: DiT, given: Call) -> list[Tensor]:
    """Results of the dense network in float32."""
    return by_dense(copy.deepcopy(network).float(), given.to(torch.float32))


@pytest.mark.parametrize(
    ("name", "direction"),
    [*((name, "x t s") for name in CONFIGS), *(("class-conditional", direction) for direction in DIRECTIONS)],
)
def test_pairs_and_func_jvp_equal_the_dense_network_with_all_gradients(name: str, direction: str) -> None:
    network = trained(CONFIGS[name], seed=2)
    given = call(CONFIGS[name], direction)
    exact = by_dense(network, given)
    budget = network_budget(rounded(network, given), exact, torch.float32, torch.float64)
    assert relative_error(by_pairs(network, given), exact) <= budget
    assert relative_error(by_func_jvp(network, learned(network), given), exact) <= budget
    plain = network(*given.inputs, given.labels, given.beta)
    assert torch.equal(plain, by_pairs(network, given)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_float32_results_are_those_of_the_formulas_to_rounding(name: str) -> None:
    network, given = trained(replace(CONFIGS[name], attention_backend=None), seed=3), call(CONFIGS[name], "s")
    exact = by_dense(network, given)
    budget = network_budget(rounded(network, given), exact, torch.float32, torch.float32)
    results = by_pairs(network.float(), given.to(torch.float32))
    assert all(result.dtype == torch.float32 for result in results)
    assert relative_error(results, exact) <= budget


@pytest.mark.parametrize("name", ["class-conditional", "as a plain DiT"])
def test_autocast_keeps_the_error_of_dense_autocast_and_gives_float32(name: str) -> None:
    network, given = trained(CONFIGS[name], seed=4), call(CONFIGS[name], "s")
    exact = by_dense(network, given)
    network, given = network.float(), given.to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        results, same_type = by_pairs(network, given), by_dense(network, given)
    assert all(result.dtype == torch.float32 for result in results)
    assert relative_error(results, exact) <= network_budget(same_type, exact, torch.bfloat16, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_on_a_gpu_keeps_the_error_of_dense_autocast(name: str) -> None:
    network, given = trained(replace(CONFIGS[name], attention_backend="triton"), seed=4), call(CONFIGS[name], "s")
    exact = by_dense(network, given)
    network, given = network.float().cuda(), given.to(torch.float32, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        results, same_type = ([z.cpu() for z in way(network, given)] for way in (by_pairs, by_dense))
    assert relative_error(results, exact) <= network_budget(same_type, exact, torch.bfloat16, torch.bfloat16)


def test_autocast_leaves_norms_and_embeddings_in_float32() -> None:
    network, given = trained(tiny(depth=1), seed=4, dtype=torch.float32), call(tiny(), "s").to(torch.float32)
    seen: dict[str, torch.dtype] = {}
    for name in ("t_embedder", "s_embedder", "guidance_embedder", "x_embedder", "blocks.0.attn"):
        hook = lambda _m, _i, output, name=name: seen.update({name: output.value.dtype})  # noqa: E731
        network.get_submodule(name).register_forward_hook(hook)
    network.blocks[0].register_forward_hook(lambda _m, _i, output: seen.update(block=output[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        by_pairs(network, given)
    assert seen.pop("blocks.0.attn") == torch.bfloat16
    assert set(seen.values()) == {torch.float32} and len(seen) == 5


def test_detach_stops_the_gradient_through_the_tangent_only() -> None:
    network, given = trained(tiny(), seed=5), call(tiny(), "s")
    F, F_t = network(*given.inputs, given.labels, given.beta, given.tangents)
    detached, detached_t = network(*given.inputs, given.labels, given.beta, given.tangents, detach=True)
    assert torch.equal(F, detached) and torch.equal(F_t, detached_t)
    assert F_t.requires_grad and not detached_t.requires_grad
    weights = list(learned(network).values())
    without = torch.autograd.grad((F * given.cotangents[0]).sum(), weights)
    with_detach = torch.autograd.grad((detached * given.cotangents[0]).sum(), weights)
    exact = by_dense(network, given)
    budget = network_budget(rounded(network, given), exact, torch.float32, torch.float64)
    assert relative_error(with_detach, without) <= budget


def test_detach_saves_the_backward_pass_of_the_tangent() -> None:
    network, given = trained(tiny(), seed=5), call(tiny(), "s")
    products = {}
    for detach in (True, False):
        F, F_t = network(*given.inputs, given.labels, given.beta, given.tangents, detach=detach)
        with counted() as ops:
            (F.sum() + F_t.sum()).backward()
        products[detach] = sum(count for name, count in ops.items() if name.startswith(("aten.mm", "aten.addmm")))
    plain = network(*given.inputs, given.labels, given.beta)
    with counted() as ops:
        plain.sum().backward()
    assert products[True] == ops["aten.mm.default"] + ops["aten.addmm.default"] < products[False]


class Counted(TorchDispatchMode):
    """Counts the calls of every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    with Counted() as mode:
        yield mode.ops


@pytest.mark.parametrize(
    ("direction", "extra"),
    [
        ("s", 2 + 2 * 5 + 2),  # one embedder; modulation, qkv, proj and two layers a block; modulation and output
        ("x", 1 + 2 * 4 + 1),  # the condition has no tangent
        ("t", 2 + 2 + 2 * 5 + 2),
        ("", 0),
    ],
)
def test_only_tangents_that_exist_are_evaluated(direction: str, extra: int) -> None:
    network, given = trained(tiny(attention_backend="tiled"), seed=6, dtype=torch.float32), call(tiny(), direction)
    given = given.to(torch.float32)

    def products(tangents: Any) -> int:
        with torch.no_grad(), counted() as ops:
            network(*given.inputs, given.labels, given.beta, tangents)
        assert not any("layer_norm" in name for name in ops)
        return sum(count for name, count in ops.items() if name in ("aten.mm.default", "aten.addmm.default"))

    assert products(given.tangents) - products(None) == extra


def test_no_tangent_at_all_gives_a_zero_tangent() -> None:
    network, given = trained(tiny(), seed=6), call(tiny(), "")
    F, F_t = network(*given.inputs, given.labels, given.beta, (None, None, None))
    assert torch.equal(F_t, torch.zeros_like(F))


def test_blocks_can_be_checkpointed() -> None:
    network, given = trained(tiny(), seed=7), call(tiny(), "s")
    plain = by_pairs(network, given)
    for block in network.blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    assert all(map(torch.equal, by_pairs(network, given), plain))


def test_blocks_can_be_compiled() -> None:
    config = tiny(depth=1)
    network, given = trained(config, seed=7), call(config, "x s")
    exact = by_dense(network, given)
    budget = network_budget(rounded(network, given), exact, torch.float32, torch.float64)
    network.blocks[0].compile(backend="aot_eager", fullgraph=True)
    assert relative_error(by_pairs(network, given), exact) <= budget
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("position", "wrong", "named"),
    [
        (0, torch.zeros(3, 3, 6, 5, dtype=torch.float64), "x"),
        (0, torch.zeros(3, 3, 6, 6), "x"),
        (1, torch.zeros(3, 1, dtype=torch.float64), "t"),
        (2, torch.zeros(2, dtype=torch.float64), "s"),
        (3, torch.zeros(3), "labels"),
        (4, None, "beta"),
        (5, (torch.zeros(3, 3, 6, 5), None, None), "x_t"),
        (5, (None, torch.zeros(1), None), "t_t"),
        (5, (None, None), "tangents"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(position: int, wrong: Any, named: str) -> None:
    given = call(tiny())
    arguments: list[Any] = [*given.inputs, given.labels, given.beta, given.tangents]
    arguments[position] = wrong
    with pytest.raises(ValueError, match=f"^{named}: expected .*, got "):
        trained(tiny(), seed=0)(*arguments)


def test_a_network_without_guidance_takes_no_beta() -> None:
    given = call(tiny())
    with pytest.raises(ValueError, match=r"^beta: expected None"):
        trained(tiny(guidance=False), seed=0)(*given.inputs, given.labels, given.beta)
