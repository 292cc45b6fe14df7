"""What a test needs to know of a client: a network from a package, how to call it as u(x, t, r), and what serves it."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BAR = 1e-9  # of relative errors in norm, in float64
Call = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Client:
    """One variant of a network of somebody else's.

    name: how tests and docs/models.md call it.
    package: what must be installed.
    build: makes the network, small and random.
    call: u(x, t, r) of the network, differentiable in all of them; x [2, ...], t and r [2].
    shape: that of x.
    served: how its attention is served within `replaced`: "flashjvp", "dense equations" (refused, and so only with
        fallback="dense"), or "own equations" (it calls nothing that could be replaced).
    why: the reason where it is not "flashjvp", or not all of it.
    checkpoints: whether it recomputes parts of itself in the backward pass; `plain` turns that off, for the reference.
    """

    name: str
    package: str
    build: Callable[[], nn.Module]
    call: Call
    shape: tuple[int, ...]
    served: str = "flashjvp"
    why: str = ""
    checkpoints: bool = False
    plain: Callable[[nn.Module], None] = field(default=lambda _: None)

    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.package) is not None

    def network(self, seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The network with parameters that are all random: zeros and ones, as trained networks start, hide errors."""
        torch.manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            network = self.build()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in network.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(parameter + 0.05 * noise)
        return network.to(dtype)

    def inputs(self, seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """x, t, r, and the velocity v of x; times between 0.1 and 0.9, t > r."""
        generator = torch.Generator().manual_seed(seed + 1)
        x, v = torch.randn(2, *self.shape, generator=generator, dtype=dtype).unbind()
        r, t = (0.1 + 0.8 * torch.rand(2, self.shape[0], generator=generator, dtype=dtype)).sort(dim=0)[0].unbind()
        return tuple(y.clone() for y in (x, t, r, v))  # no views, whose tangents torch.compile wants laid out alike


def timed(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """x as it depends on times, for networks that take none."""
    shape = (-1,) + (1,) * (x.ndim - 1)
    return x * (1 + 0.5 * torch.sin(3 * t)).view(shape) + torch.cos(2 * r).view(shape)


def u_and_du(client: Client, network: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """u and its derivative along the path: the JVP with tangents v of x, 1 of t and 0 of r."""
    x, t, r, v = inputs
    tangents = (v, torch.ones_like(t), torch.zeros_like(r))
    return torch.func.jvp(lambda *given: client.call(network, *given), (x, t, r), tangents)


def meanflow_like(u: Tensor, du: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """The JVP is part of a target, through which no gradient flows."""
    return _residual(u, du.detach(), inputs).square().mean()


def tvm_like(u: Tensor, du: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """The gradient flows through the JVP."""
    return _residual(u, du, inputs).square().mean()


def _residual(u: Tensor, du: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    _, t, r, _ = inputs
    return u + (t - r).view((-1,) + (1,) * (u.ndim - 1)) * du - 0.1


LOSSES = {"meanflow": meanflow_like, "tvm": tvm_like}


@contextmanager
def stock_math() -> Iterator[None]:
    """PyTorch's own attention by its equations, and norms written out, whose JVPs have the right gradient."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def wide(x: Tensor) -> Tensor:
        """As autocast has it for norms."""
        return x.float() if torch.is_autocast_enabled("cpu") else x

    def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, cudnn_enable=True):  # type: ignore[no-untyped-def]
        dims, x = tuple(range(-len(normalized_shape), 0)), wide(x)
        centred = x - x.mean(dims, keepdim=True)
        y = centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()
        y = y if weight is None else y * weight
        return y if bias is None else y + bias

    def group_norm(x, num_groups, weight=None, bias=None, eps=1e-5):  # type: ignore[no-untyped-def]
        x = wide(x)
        grouped = x.reshape(x.shape[0], num_groups, -1)
        centred = grouped - grouped.mean(-1, keepdim=True)
        y = (centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
        of_channels = (1, -1) + (1,) * (x.ndim - 2)
        y = y if weight is None else y * weight.view(of_channels)
        return y if bias is None else y + bias.view(of_channels)

    def attention(query, key, value, attn_mask=None, *rest, **more):  # type: ignore[no-untyped-def]
        """PyTorch's, which has NaN for the tangent of a query that may see no key: such a row is zero, and constant."""
        if attn_mask is None or attn_mask.dtype != torch.bool:
            return stock["attention"](query, key, value, attn_mask, *rest, **more)
        none = ~attn_mask.any(-1, keepdim=True)
        return stock["attention"](query, key, value, attn_mask | none, *rest, **more).masked_fill(none, 0.0)

    stock = {"attention": F.scaled_dot_product_attention, "layer": F.layer_norm, "group": F.group_norm}
    of_torch = torch.layer_norm
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as undo:
        undo.callback(setattr, F, "scaled_dot_product_attention", stock["attention"])
        undo.callback(setattr, F, "layer_norm", stock["layer"])
        undo.callback(setattr, F, "group_norm", stock["group"])
        undo.callback(setattr, torch, "layer_norm", of_torch)
        undo.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        F.layer_norm = torch.layer_norm = layer_norm  # type: ignore[assignment]
        F.group_norm, F.scaled_dot_product_attention = group_norm, attention
        torch.backends.mha.set_fastpath_enabled(False)
        undo.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


Results = dict[str, Tensor]


def results(client: Client, network: nn.Module, inputs: tuple[Tensor, ...], losses: tuple[str, ...]) -> Results:
    """u, du and, for each loss, its value and the gradients of all parameters; what gets none has zeros."""
    found: Results = {}
    parameters = dict(network.named_parameters())
    for name in losses:
        u, du = u_and_du(client, network, inputs)
        loss = LOSSES[name](u, du, inputs)
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        found |= {"u": u.detach(), "du": du.detach(), f"{name} loss": loss.detach()}
        for key, gradient, parameter in zip(parameters, gradients, parameters.values(), strict=True):
            found[f"{name} d_{key}"] = torch.zeros_like(parameter) if gradient is None else gradient
    return found


def errors(found: Results, exact: Results) -> dict[str, float]:
    """Relative errors in norm; of gradients, relative to the mean norm of all gradients of that loss at least.

    Keys of a gradient that cancels (a bias of keys, to which attention is indifferent) have no digits of their own.
    """
    assert found.keys() == exact.keys()
    floor: dict[str, float] = {}
    for loss in {key.split(" d_")[0] for key in exact if " d_" in key}:
        norms = torch.stack([exact[key].norm().double() for key in exact if key.startswith(f"{loss} d_")])
        floor[loss] = norms.square().mean().sqrt().item()
    result = {}
    for key, value in exact.items():
        scale = max(value.norm().item(), floor.get(key.split(" d_")[0], 0.0) if " d_" in key else 0.0)
        result[key] = (found[key].double() - value.double()).norm().item() / scale
    return result


def joined_errors(found: Results, exact: Results) -> dict[str, float]:
    """Relative errors in norm of u, du and, for each loss, of all its gradients as one vector."""

    def joined(of: Results) -> Results:
        losses = {key.split(" d_")[0] for key in of if " d_" in key}
        whole = {key: value.double() for key, value in of.items() if key in ("u", "du")}
        parts = {loss: [of[key].double().flatten() for key in of if key.startswith(f"{loss} d_")] for loss in losses}
        return whole | {f"gradients of {loss}": torch.cat(part) for loss, part in parts.items()}

    given, right = joined(found), joined(exact)
    return {key: ((given[key] - value).norm() / value.norm()).item() for key, value in right.items()}
