"""Triton's interpreter gives the same bits when it is hastened, and prepares the language seldom."""

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from verify.budget.tolerance import same_bits
from verify.cases.case import Case
from verify.cases.inputs import Inputs, make_inputs
from verify.oracles.attention import Results, run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter serves machines without a GPU")


def counted(inputs: Inputs) -> tuple[Results, int, int]:
    """The results, and how often the language was prepared in how many launches."""
    prepared: list[object] = []
    launches: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        prepare, arguments = interpreter._patch_lang_core, interpreter.GridExecutor._init_args_hst
        patch.setattr(interpreter, "_patch_lang_core", lambda *x: (prepared.append(x), prepare(*x)))
        patch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda *x: (launches.append(x), arguments(*x))[1])
        return run(inputs, "triton"), len(prepared), len(launches)


def test_the_same_bits_with_less_to_do() -> None:
    inputs = make_inputs(Case("small", (1,), 2, 1, m=5, n=7, d=8, dv=8, is_causal=True), torch.float32)
    found, prepared, launches = counted(inputs)
    assert 0 < launches <= prepared <= 3 * launches
    with pytest.MonkeyPatch.context() as patch:  # undoes what conftest.py did
        patch.setattr(interpreter, "_patch_lang", interpreter._patch_lang.__wrapped__)
        patch.setattr(interpreter.GridExecutor, "__call__", interpreter.GridExecutor.__call__.__wrapped__)
        patch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions())
        expected, as_it_was, _ = counted(inputs)
    assert as_it_was > 10 * prepared
    assert all(identity.ok for identity in same_bits(found, expected))


def test_nothing_is_left_in_the_language() -> None:
    before = {name: vars(tl)[name] for name in ("range", "load", "dot")}
    run(make_inputs(Case("small", (1,), 1, 1, m=5, n=7, d=8, dv=8), torch.float32), "triton")
    assert {name: vars(tl)[name] for name in before} == before
