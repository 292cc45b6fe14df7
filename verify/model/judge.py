"""Judges a case of `python -m verify model` against the dense network, one row for each quantity."""

import contextlib
import functools
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from flashjvp_commands.entry import program
from tvm_ref.model.dit import DiT

from ..budget.network_tolerance import network_budget, relative_error
from ..budget.tolerance import STEP, STEP_GRID, finite_difference
from ..run.judge import Run
from .cases import ModelCase, Part
from .evaluate import Call, Found, Setting, dense, evaluate, make_setting
from .stock_norms import stock_norms


@dataclass(frozen=True, kw_only=True)
class ModelVerdict:
    """One quantity of a case. `error` and `budget` are relative Frobenius norms without unit, of all tensors of the
    quantity together; None is what a case does not have. `measured` is what the dense network loses in the same type.
    """

    part: str
    network: str
    precision: str
    backend: str
    way: str
    quantity: str
    error: float | None = None
    budget: float | None = None
    measured: float | None = None
    ok: bool
    reason: str = ""
    seed: int
    reproduce: str

    @property
    def share(self) -> float | None:
        """Error over budget: up to 1 is within."""
        if self.error is None or not self.budget:
            return None
        return self.error / self.budget


COLUMNS = tuple(field.name for field in fields(ModelVerdict))


def judge_model(case: ModelCase, device: str, seed: int) -> list[ModelVerdict]:
    """The verdicts of a case; whatever it raises is raised."""
    setting = make_setting(case.network, case.config, device, seed)
    if case.part == "operators":
        return [_row(case, device, seed, "operators", **_operators(case, setting, device))]
    if case.part == "difference":
        return [_row(case, device, seed, "gradients", **_difference(setting))]
    kind = torch.float64 if case.precision == "float64" else torch.float32
    found = evaluate(case, setting.to(kind), device)
    exact, measured, coarse = _oracle(case.part, case.network, case.precision, device, seed)
    rows = []
    # A few numbers may have been lucky in the dense evaluation, all of them together cannot be.
    together = network_budget(_flat(measured), _flat(exact), coarse, case.dtype)
    for name, tensors in found.items():
        budget = max(together, network_budget(measured[name], exact[name], coarse, case.dtype))
        error = relative_error(tensors, exact[name])
        numbers = {"error": error, "budget": budget, "measured": relative_error(measured[name], exact[name])}
        ok = error <= budget
        rows.append(_row(case, device, seed, name, ok=ok, reason="" if ok else "outside the error budget", **numbers))
    return rows


def judge_case(case: ModelCase, run: Run) -> tuple[list[ModelVerdict], bool]:
    """The verdicts of a case, and whether the process may go on to another. An exception is a failing row."""
    try:
        return judge_model(case, run.device, run.seed), True
    except Exception as error:
        usable = not isinstance(error, torch.AcceleratorError)  # the GPU context is lost
        return lost(case, run, f"{type(error).__name__}: {error}"), usable
    finally:
        if torch.device(run.device).type == "cuda":
            with contextlib.suppress(torch.AcceleratorError):
                torch.cuda.empty_cache()  # memory is shared with the other processes


def lost(case: ModelCase, run: Run, reason: str) -> list[ModelVerdict]:
    """The failing row of a case that came to no verdict."""
    return [_row(case, run.device, run.seed, "call", ok=False, reason=" ".join(reason.split())[:300])]


@functools.lru_cache(maxsize=64)
def _oracle(part: Any, network: str, precision: Any, device: str, seed: int) -> tuple[Found, Found, torch.dtype]:
    """Exact quantities, those of the dense network in the type judged (float32 if that is float64), and that type."""
    case = ModelCase(part, network, precision)
    setting = make_setting(network, case.config, device, seed)
    exact = dense(ModelCase(part, network, "float64"), setting, device)
    measured = dense(case, setting.to(torch.float32), device)
    return exact, measured, torch.float32 if precision == "float64" else case.dtype


def _flat(found: Found) -> list[Tensor]:
    return [tensor for tensors in found.values() for tensor in tensors]


def _operators(case: ModelCase, setting: Setting, device: str) -> dict[str, Any]:
    """Runs the dual network, the JVP of the plain one and two objectives, and says which norms of torch they call."""
    parts: tuple[Part, ...] = ("network", "func.jvp", "tvm", "meanflow")
    with stock_norms() as used:
        for part in parts:
            evaluate(replace(case, part=part), setting.to(torch.float64), device)
    return {"ok": not used, "reason": f"calls {', '.join(sorted(used))}" if used else ""}


def _difference(setting: Setting) -> dict[str, Any]:
    """The derivative of <F, d_F> + <F_t, d_F_t> along a change of all weights by +-1, without the dense network."""
    network, call = setting.network, setting.call
    weights = [p for p in network.parameters() if p.requires_grad]
    draw = torch.Generator().manual_seed(0)
    along = [(2 * torch.randint(2, p.shape, generator=draw) - 1).to(p) for p in weights]
    for p in weights:
        p.data = (p.data / STEP_GRID).round() * STEP_GRID  # so that steps are exact

    def product(at: DiT, given: Call) -> tuple[Tensor, Tensor, Tensor]:
        F, F_t = at(*given.inputs, given.labels, given.beta, given.tangents)
        return (F * given.cotangents[0]).sum() + (F_t * given.cotangents[1]).sum(), F, F_t

    def moved(by: float) -> Tensor:
        for p, direction in zip(weights, along, strict=True):
            p.data += by * direction
        value = product(network, call)[0].detach()
        for p, direction in zip(weights, along, strict=True):
            p.data -= by * direction
        return value

    value, F, F_t = product(network, call)
    gradients = torch.autograd.grad(value, weights)
    slope = torch.stack([(g * d).sum() for g, d in zip(gradients, along, strict=True)]).sum()
    quotients = [(moved(h) - moved(-h)) / (2 * h) for h in (STEP, 2 * STEP)]
    single = setting.to(torch.float32)
    loss = network_budget(product(single.network, single.call)[1:], [F, F_t], torch.float32, torch.float64)
    sizes = [(z.norm() * d.norm()).item() for z, d in zip((F, F_t), call.cotangents, strict=True)]
    steep = sum((g.norm() * d.norm()).item() for g, d in zip(gradients, along, strict=True))
    found = finite_difference("gradients", slope, (quotients[0], quotients[1]), loss * sum(sizes), loss * steep)
    return {"error": found.error, "budget": found.budget, "ok": found.ok, "reason": "" if found.ok else "not the slope"}


def _row(case: ModelCase, device: str, seed: int, quantity: str, **measured: Any) -> ModelVerdict:
    return ModelVerdict(
        part=case.part, network=case.network, precision=case.precision, backend=case.backend, way=case.way,
        quantity=quantity, seed=seed,
        reproduce=f"{program('verify')} model --device {device} --case {case.name} --seed {seed}", **measured,
    )  # fmt: skip
