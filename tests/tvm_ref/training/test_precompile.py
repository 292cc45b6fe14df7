"""Tests which attention kernels a run compiles ahead of its first step. The compiler is replaced."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import flashjvp
from tvm_ref.training import precompile
from tvm_ref.training.presets import PRESETS

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
OF_NETWORK = {"backward": True, "tokens": 256, "device": CUDA}


def _asked(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None, device: torch.device = CUDA, **loss):
    """What is asked of `flashjvp.precompile` for the published network with another loss."""
    asked = []

    def record(*args, **options):
        asked.append((args, options))
        if error is not None:
            raise error

    monkeypatch.setattr(
        precompile, "flashjvp", SimpleNamespace(precompile=record, UnsupportedError=flashjvp.UnsupportedError)
    )
    config = PRESETS["imagenet256-w2"]()
    config = replace(config, loss=replace(config.loss, **loss), run=replace(config.run, precision="bfloat16"))
    thread = precompile.precompile_attention(config, device)
    if thread is not None:
        thread.join()
    return asked


def test_a_run_compiles_attention_with_its_jvp_and_without(monkeypatch):
    shape = (64, torch.bfloat16)
    assert _asked(monkeypatch) == [
        (shape, OF_NETWORK | {"tangents": "qkv"}), (shape, OF_NETWORK | {"tangents": ""}),
    ]  # fmt: skip


@pytest.mark.parametrize("loss", [{"detach": True}, {"objective": "meanflow"}])
def test_where_no_gradient_flows_through_the_tangent_its_backward_pass_is_left_out(monkeypatch, loss):
    assert [options["backward"] for _, options in _asked(monkeypatch, **loss)] == [False, True]


def test_flow_matching_needs_no_jvp(monkeypatch):
    assert [options["tangents"] for _, options in _asked(monkeypatch, objective="flow")] == [""]


def test_where_no_kernel_serves_nothing_is_said(monkeypatch, recwarn):
    assert len(_asked(monkeypatch, error=flashjvp.UnsupportedError("no kernels"))) == 1
    assert not recwarn.list


def test_an_error_of_the_compiler_is_a_warning(monkeypatch):
    with pytest.warns(UserWarning, match="not compiled ahead of the first step: ptxas"):
        assert len(_asked(monkeypatch, error=RuntimeError("ptxas"))) == 1


def test_a_cpu_has_nothing_to_compile(monkeypatch):
    assert _asked(monkeypatch, device=CPU) == []
