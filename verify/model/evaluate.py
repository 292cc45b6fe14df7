"""Evaluates a case of `python -m verify model`: by tvm_ref as the trainer runs it, and by the dense network."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tvm_ref.data.dataset import DataConfig
from tvm_ref.model.dit import DiT, DiTConfig
from tvm_ref.objective.loss import Batch, LossConfig
from tvm_ref.training import parallel
from tvm_ref.training.config import RunConfig, TrainConfig
from tvm_ref.training.step import Objective

from ..oracles import network as dense_model
from ..oracles.network import Weights, trained, weights_of
from ..oracles.objectives import dense_terms
from .cases import LONG, LOSSES, ModelCase

IMAGES = 6
FEWER_IMAGES = {"XL/2 width": 2, LONG: 1}
Found = dict[str, list[Tensor]]  # tensors by quantity


class Call(NamedTuple):
    """Arguments of a network, their tangents, the cotangents of F and F_t, and inputs and cotangents of one block."""

    inputs: tuple[Tensor, Tensor, Tensor]
    labels: Tensor
    beta: Tensor | None
    tangents: tuple[Tensor, Tensor, Tensor]  # x_t, t_t, s_t
    cotangents: tuple[Tensor, Tensor]
    tokens: tuple[Tensor, Tensor, Tensor, Tensor]  # x, c, x_t, c_t
    token_cotangents: tuple[Tensor, Tensor]


class Setting(NamedTuple):
    """What is evaluated: a network with random weights, a target network, a call and a batch, in one type."""

    network: DiT
    target: DiT
    call: Call
    batch: Batch

    def to(self, dtype: torch.dtype) -> "Setting":
        """A copy in another type."""
        network, target = (copy.deepcopy(x).to(dtype) for x in (self.network, self.target))
        return Setting(network, target, _to(self.call, dtype), _to(self.batch, dtype))


def make_setting(name: str, config: DiTConfig, device: str, seed: int) -> Setting:
    """Random weights and numbers in float64 that float32 holds exactly, the same for every backend of a network."""
    draw = torch.Generator().manual_seed(seed)
    images = FEWER_IMAGES.get(name, IMAGES)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).double()

    def uniform(count: int) -> list[Tensor]:
        return [torch.rand(images, generator=draw).double() for _ in range(count)]

    shape = (images, config.channels, config.image_size, config.image_size)
    tokens, condition = (images, config.grid**2, config.width), (images, config.width)
    (x, x_t, d_F, d_F_t, x0, x1), (t, s, t_t, s_t, beta, s2) = [normal(*shape) for _ in range(6)], uniform(6)
    labels = torch.randint(config.num_classes + 1, (images,), generator=draw)
    call = Call(
        (x, t, s), labels, beta if config.guidance else None, (x_t, t_t, s_t), (d_F, d_F_t),
        (normal(*tokens), normal(*condition), normal(*tokens), normal(*condition)), (normal(*tokens), normal(*tokens)),
    )  # fmt: skip
    end, start = torch.minimum(t, s), torch.maximum(t, s)
    if images > 1:
        end[0] = start[0]  # flow matching
    w = 1 / (0.25 + uniform(1)[0]) if config.num_classes else torch.ones_like(t)
    no_class = torch.full_like(labels, config.num_classes)
    batch = Batch(x0, x1, labels, torch.where(labels == no_class, 1.0, w), start, end, s2, no_class)
    network, target = (trained(config, 2 * seed + i).to(device) for i in range(2))
    return Setting(network, target, _to(call, torch.float64, device), _to(batch, torch.float64, device))


def evaluate(case: ModelCase, setting: Setting, device: str) -> Found:
    """The quantities of a case by tvm_ref, its blocks recomputed and compiled as the trainer does it.

    As in training, the backward pass runs after autocast has ended.
    """
    network, target, call, batch = setting
    weights = _learned(network)
    objective = Objective(network, _train_config(case), torch.device(device))
    parallel.recompute(network.blocks, case.recompute)
    if case.residual == "bfloat16":
        network.keep_residual_in(torch.bfloat16)
        target.keep_residual_in(torch.bfloat16)
    with _compiled(case, network, target):
        if case.part in LOSSES:
            return _loss_quantities(objective(batch, target), weights)
        leaves = [z.detach().requires_grad_() for z in call.tokens]
        with _autocast(case, device):
            if case.part == "block":
                pair = network.blocks[0](*leaves)
            elif case.part == "func.jvp":
                pair = torch.func.jvp(lambda *z: network(*z, call.labels, call.beta), call.inputs, call.tangents)
            else:
                pair = network(*call.inputs, call.labels, call.beta, call.tangents)
        return _pair_quantities(case, pair, call, leaves, weights)


def dense(case: ModelCase, setting: Setting, device: str) -> Found:
    """The same quantities by the dense network, in the type of `setting`, and under autocast if the case is."""
    network, target, call, batch = setting
    every = weights_of(network)
    weights = _learned(network)
    if case.part in LOSSES:
        with _autocast(case, device):
            terms = dense_terms(case.part, network, target, batch, True)
        return _loss_quantities(terms, weights)
    x, c, x_t, c_t = leaves = [z.detach().requires_grad_() for z in call.tokens]
    config = network.config
    with _autocast(case, device):
        if case.part == "block":
            pair = torch.func.jvp(lambda x, c: dense_model.block(every, "blocks.0", config, x, c), (x, c), (x_t, c_t))
        else:
            pair = torch.func.jvp(
                lambda x, t, s: dense_model.network(every, config, x, t, s, call.labels, call.beta),
                call.inputs,
                call.tangents,
            )
    return _pair_quantities(case, pair, call, leaves, weights)


def _learned(network: DiT) -> Weights:
    return {name: p for name, p in weights_of(network).items() if p.requires_grad}


def _pair_quantities(case: ModelCase, pair: Any, call: Call, leaves: list[Tensor], weights: Weights) -> Found:
    """Gradients are those of <value, d> + <tangent, d_t>; of a block also those of its inputs `leaves`."""
    value, tangent = pair
    if case.part == "block":
        cotangents = call.token_cotangents
        learned = [*leaves, *(weight for name, weight in weights.items() if name.startswith("blocks.0."))]
    else:
        cotangents, learned = call.cotangents, list(weights.values())
    product = (value.double() * cotangents[0]).sum() + (tangent.double() * cotangents[1]).sum()
    gradients = torch.autograd.grad(product, learned, materialize_grads=True)
    return {"value": [value.detach()], "tangent": [tangent.detach()], "gradients": list(gradients)}


def _loss_quantities(terms: Any, weights: Weights) -> Found:
    gradients = torch.autograd.grad(terms.loss.mean(), list(weights.values()), materialize_grads=True)
    return {"value": [term.detach() for term in terms], "gradients": list(gradients)}


def _train_config(case: ModelCase) -> TrainConfig:
    """The settings of the trainer that the objective reads."""
    w = 1.0 if case.config.num_classes == 0 else 2.0  # for the validation of the settings; the batch has its own
    objective: Literal["meanflow", "tvm"] = "meanflow" if case.part == "meanflow" else "tvm"
    return TrainConfig(
        model=case.config,
        data=DataConfig(),
        loss=LossConfig(objective=objective, w=w, detach=case.part == "detached"),
        run=RunConfig(
            steps=1, batch=1, out=".", precision="bfloat16" if case.precision == "bfloat16" else "float32",
            checkpointing=case.recompute, compile=case.compiled != "no",
        ),
    )  # fmt: skip


@contextlib.contextmanager
def _compiled(case: ModelCase, network: DiT, target: DiT) -> Iterator[None]:
    """Compiles the blocks of both networks without any cache, and discards what was compiled at the end."""
    if case.compiled == "no":
        yield
        return
    torch._dynamo.reset()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # dynamo's, that nothing may be changed in place where blocks are recomputed
    with torch._inductor.config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of inductor, about speed
        for module in (network, target):
            if case.compiled == "inductor":
                parallel.compile_blocks(module.blocks)
            else:
                for block in module.blocks:
                    block.compile(backend="aot_eager", dynamic=False)
        try:
            yield
        finally:
            logging.disable(level)
            torch._dynamo.reset()


def _autocast(case: ModelCase, device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=case.precision == "bfloat16")


def _to(part: Any, dtype: torch.dtype, device: str | None = None) -> Any:
    """Nested tuples of tensors in another type, on a device. Integer tensors keep their type."""
    if isinstance(part, Tensor):
        return part.to(device=device, dtype=dtype if part.is_floating_point() else part.dtype)
    if isinstance(part, tuple):
        moved = [_to(item, dtype, device) for item in part]
        return type(part)(*moved) if hasattr(part, "_fields") else tuple(moved)
    return part
