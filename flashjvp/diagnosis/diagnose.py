"""`check`: runs a model as it is and, on request, within `replaced()`, and says what it found."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import _torch
from ..errors import ArgumentTypeError, ArgumentValueError, FlashJVPError
from ..integrations import replaced as contexts
from . import advice, judge, refusals, switches
from .findings import SEVERITIES, CheckReport, Comparison, Diagnosis, Finding, Severity
from .observe import Observer, Place
from .subject import Subject

AS_IT_IS, WITHIN_REPLACED = "as it is", "within replaced()"
_NORMS = (advice.LAYER_NORM, advice.BATCH_NORM, advice.INSTANCE_NORM)
_SERVED = (advice.DROPOUT, advice.LEARNED_MASK)
_SEED = 0
Inputs = tuple[Any, ...] | list[Any] | Mapping[str, Any] | Tensor


def check(
    model: nn.Module,
    inputs: Inputs,
    tangents: Inputs,
    *,
    function: Callable[..., Any] | None = None,
    detached: bool = False,
    replaced: bool = False,
) -> CheckReport:
    """Whether a model is right, and fast, under a JVP and a backward pass through it; by module, what is not.

    With f the model, x its inputs, x_t their tangents and w its parameters, for fixed random c and c_t::

        u, u_t = jvp(f, x, x_t)        d<c, u> / dw        d<c_t, u_t> / dw

    are compared with central differences in float64: u_t with those of f, both gradients with those along three random
    directions in w. One more run in the model's own dtype shows what PyTorch refuses. All of it happens on copies in
    memory of the model's device: parameters, buffers, gradients, hooks, modes and random numbers stay as they were.
    In the copy in float64, parameters that are all zero get random values, as a layer of zeros hides errors before it.

    Args:
        model: a module that `copy.deepcopy` can copy, in training or evaluation mode, on any device. Several networks
            are one `torch.nn.ModuleDict`, called by `function`.
        inputs: what its forward takes: a tuple of positional arguments (one tensor counts as a tuple), or a dict of
            keyword arguments. Tensors, and anything else that is passed on as it is: None, numbers, class labels.
        tangents: a tuple as long, or a dict of some of the names: a tensor of its input's shape, dtype and device, in
            the input's unit per unit of the variable of differentiation, or None = zero; at least one tensor.
        function: called as `function(model, *inputs)` or `function(model, **inputs)` in place of the model itself.
        detached: True leaves the gradient through u_t out, as MeanFlow and consistency training do, which detach it;
            False takes it, as Terminal Velocity Matching does. Stock layer norms are harmless where it is detached.
        replaced: True checks the model once more within `flashjvp.replaced(model)`, to see what that mends.

    Returns:
        A `CheckReport`: `ok`, `findings` and `comparisons`, `to_dict()` for JSON; `print(report)` shows all of it.

    Derivatives:
        None: the report holds no tensors.

    Raises:
        ArgumentTypeError: (a TypeError) a model, inputs or tangents of another type; a model that cannot be copied; an
            output without a tensor of real numbers.
        ArgumentValueError: (a ValueError) inputs with which the model raises an error; tangents that do not fit their
            inputs, or none at all.

    Numerics:
        "wrong" is further off than 1e-6, relative, and than ten times what the differences may be off themselves;
        "undecided" means differences more uncertain than 1e-3. What a model computes in float32 or less by name (as
        `x.float()`) is compared in float64, too.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model: expected a torch.nn.Module, got an object of type {type(model).__name__}")
    if function is not None and not callable(function):
        raise ArgumentTypeError(f"function: expected a callable, got an object of type {type(function).__name__}")
    for name, value in (("detached", detached), ("replaced", replaced)):
        if not isinstance(value, bool):
            raise ArgumentTypeError(f"{name}: expected a bool, got an object of type {type(value).__name__}")
    diagnoses = []
    with torch.inference_mode(False), torch.enable_grad():
        for way in (AS_IT_IS, WITHIN_REPLACED)[: 2 if replaced else 1]:
            own = Subject(model, inputs, tangents, function, _SEED)
            _run_plainly(own)
            double = Subject(model, inputs, tangents, function, _SEED)
            double.to_double()
            diagnoses.append(_diagnosis(way, own, double, detached))
    return CheckReport(detached, tuple(diagnoses))


def _diagnosis(way: str, own: Subject, double: Subject, detached: bool) -> Diagnosis:
    refused: list[Place] = []
    observer, error = _observed(own, way, detached)
    if error is not None:
        refused.append(refusals.place(error, observer))
    judged: tuple[Comparison, ...] = ()
    # Attention by its equations has a JVP: with it, the rest of the model can be seen.
    double.is_dense = any(place.kind == advice.SDPA for place in refused)
    with sdpa_kernel(SDPBackend.MATH) if double.is_dense else nullcontext():
        observer, error = _observed(double, way, detached)
        if error is None:
            with _around(way, double):
                judged = judge.comparisons(double, detached)
        else:
            refused.append(refusals.place(error, observer))
    calls = observer.calls
    with _around(way, own):  # which turns switches on
        findings = _findings(calls, refused, judged, detached, own.model)
    findings += _of_inference(own, way)
    return Diagnosis(way, tuple(sorted(findings, key=lambda found: SEVERITIES.index(found.severity))), judged)


def _run_plainly(subject: Subject) -> None:
    """A model that does not run at all has no derivatives to be judged."""
    try:
        subject.output()
    except FlashJVPError:
        raise
    except Exception as error:  # the model's code may raise anything
        came = f"{type(error).__name__}: {error}"
        raise ArgumentValueError(f"inputs: expected what the model takes, got {came}") from error


def _around(way: str, subject: Subject) -> AbstractContextManager[Any]:
    if way == AS_IT_IS:
        return nullcontext()
    return contexts.replaced(subject.model, fallback="dense" if subject.is_dense else "raise")


def _observed(subject: Subject, way: str, detached: bool) -> tuple[Observer, Exception | None]:
    """One JVP, which is watched, with a backward pass through it, which is not; and the error that one raises."""
    observer = Observer(subject.paths)
    is_double = subject.is_double
    try:
        with _around(way, subject):
            with observer.watching():
                found = subject.jvp(keeps_buffers=is_double)
            judge.backward(found, subject.parameters, detached)
    except Exception as error:  # what PyTorch refuses, or what the model's code makes of that: both are findings
        return observer, error
    return observer, None


def _of_inference(subject: Subject, way: str) -> list[Finding]:
    """PyTorch's encoder layers take a path of their own where nothing needs a gradient; that one has no JVP."""
    kinds = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    if not any(isinstance(module, kinds) and not module.training for module in subject.model.modules()):
        return []
    observer = Observer(subject.paths)
    try:
        with torch.no_grad(), _around(way, subject):
            subject.jvp()
    except Exception as error:  # the model's code may raise anything without gradients; one refusal is looked for
        place = refusals.place(error, observer)
        if place.kind == advice.FAST_PATH:
            return [_finding(place, "harmless", 1)]
    return []


def _findings(
    calls: Counter[Place],
    refused: Sequence[Place],
    judged: Sequence[Comparison],
    detached: bool,
    model: nn.Module,
) -> list[Finding]:
    found = []
    for place, count in calls.items():
        if (place.kind, place.path) in {(other.kind, other.path) for other in refused} - {(advice.SDPA, place.path)}:
            continue
        found.append(_judged_finding(place, count, refused, judged, detached, model))
    for place in dict.fromkeys(refused):
        if place.kind != advice.SDPA or not any(other.kind == advice.SDPA for other in calls):
            found.append(_finding(place, "refused", max(1, calls[place])))
    is_explained = any(other.severity == "wrong" for other in found)
    is_explained = is_explained or (not _is_finite(judged) and any(other.kind == advice.SDPA for other in calls))
    if any(comparison.verdict == "wrong" for comparison in judged) and not is_explained:
        found.append(_finding(Place(advice.UNKNOWN, "", type(model).__name__), "wrong", 1))
    if _torch.TorchDispatchMode is None:
        found.append(_finding(Place(advice.UNSEEN, "", type(model).__name__), "slow", 1))
    return found


def _is_finite(judged: Sequence[Comparison]) -> bool:
    """Stock attention's gradients are NaN where a query sees no key."""
    return all(math.isfinite(comparison.off) for comparison in judged)


def _judged_finding(
    place: Place, calls: int, refused: Sequence[Place], judged: Sequence[Comparison], detached: bool, model: nn.Module
) -> Finding:
    """What is seen is judged by what the comparisons say of the whole."""
    wrong = [comparison.what for comparison in judged if comparison.verdict == "wrong"]
    if place.kind in _NORMS and place.detail != advice.BY_FLASHJVP:
        if detached:
            return _finding(place, "harmless", calls, advice.DETACHED_NORM)
        if judged and all(comparison.verdict == "right" for comparison in judged):
            return _finding(place, "harmless", calls, advice.HARMLESS_NORM)
        return _finding(place, "wrong", calls)
    if place.kind == advice.OWN_JVP:
        return _finding(place, "wrong", calls) if wrong else _finding(place, "fine", calls, advice.NOTHING)
    if place.kind in (advice.CUT, advice.NO_GRAD):
        is_felt = judge.JVP in wrong or judge.GRADIENT in wrong
        return _finding(place, "wrong" if is_felt else "harmless", calls)
    if place.kind == advice.SDPA:
        if any(other.kind == advice.SDPA for other in refused):
            return _finding(place, "refused", calls)
        return _finding(place, "slow" if _is_finite(judged) else "wrong", calls)
    if place.kind == advice.DENSE:
        to_turn = switches.to_turn(model, place.path)
        kind = advice.DENSE if to_turn is None else advice.SWITCH
        return _finding(place._replace(kind=kind), "slow", calls, to_turn)
    return _finding(place, "fine", calls, None if place.kind in _SERVED else advice.NOTHING)


def _finding(place: Place, severity: Severity, calls: int, what_to_do: str | None = None) -> Finding:
    words = what_to_do or advice.ADVICE[place.kind]
    return Finding(place.kind, place.path, place.module, severity, calls, words, place.detail)
