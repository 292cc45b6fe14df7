"""`explain` says what serves a call, launches nothing for it, and judges arguments as the call itself does."""

import contextlib
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

import flashjvp
from flashjvp import support
from flashjvp.backends import select
from flashjvp.kernels.hopper import eligibility
from flashjvp.kernels.launch import replaced, schedule
from flashjvp.kernels.launch.call import Call
from flashjvp.operands import Inputs
from tests.flashjvp.bad_calls import BOTH, JVP_ONLY, VIEWS, Bad, Recorder, good
from tests.flashjvp.kernels.test_hopper import CASES, interpreted, pipelines_in_use
from verify.cases.case import Case
from verify.cases.inputs import make_inputs
from verify.emulator.gluon import emulated
from verify.oracles.attention import run

EXPLAIN = importlib.import_module("flashjvp.explain")  # whose name in the package is the function's
HALF: dict[str, Any] = {"device": "meta", "dtype": torch.bfloat16}


def qkv(*shape: int, **options: Any) -> list[Tensor]:
    return [torch.empty(shape, **options) for _ in range(3)]


def every_release_verified() -> contextlib.AbstractContextManager[None]:
    """As with a Triton that the warp-specialised kernels are in use with."""
    return replaced.pipelines(schedule.PIPELINES["sm_90"])


def test_it_prints_what_it_returns_within_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    for backend in (None, "triton", "tiled", "reference"):
        explanation = flashjvp.explain(*qkv(2, 4, 100, 70, **HALF), backend=backend)
        printed = capsys.readouterr().out
        assert printed == f"{explanation}\n"
        assert max(map(len, printed.splitlines())) <= 80
        assert len(printed.splitlines()) <= 20
        assert explanation.backend == (backend or "tiled")
        assert explanation.versions["torch"] == torch.__version__


@pytest.mark.parametrize("bad", [*BOTH, *JVP_ONLY], ids=lambda bad: bad.name)
def test_it_raises_what_the_call_raises(bad: Bad) -> None:
    arguments = {**good(), **bad.change()}
    with pytest.raises(bad.error) as of_call:
        flashjvp.attention_jvp(**arguments)
    with pytest.raises(bad.error, match=re.escape(str(of_call.value))):
        flashjvp.explain(**arguments)


@pytest.mark.parametrize("backend", [None, "triton"])
def test_it_copies_and_computes_nothing(backend: str | None) -> None:
    """Neither what autocast casts nor a mask whose last dim is strided, which the kernels copy."""
    q, k, v = qkv(2, 1, 40, 64)
    mask = torch.empty(50, 40).mT
    keys = [x.expand(2, 3, 40, 64) for x in (k, v)]
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter serves machines without a GPU")
    with Recorder() as seen, torch.autocast("cpu", torch.float16):
        flashjvp.explain(q[:, :, :, :], *(x[:, :1] for x in keys), attn_mask=mask[:40, :40], backend=backend)
    assert seen.names <= {*VIEWS, "aten::alias", "aten::empty_like", "aten::slice"}


def test_without_a_gpu_plain_pytorch_is_explained() -> None:
    on_cpu = flashjvp.explain(*qkv(2, 4, 100, 64))
    assert (on_cpu.backend, on_cpu.kernels, on_cpu.measured) == ("tiled", "plain PyTorch, tile by tile", False)
    assert on_cpu.why_not_faster == ("tensors on the cpu device: the kernels need a GPU",)
    assert on_cpu.tiles["forward"] == {"queries": 100, "keys": 100}
    (reason,) = flashjvp.explain(*qkv(2, 4, 100, 64, **HALF)).why_not_faster
    assert "backend='triton'" in reason
    assert flashjvp.explain(*qkv(0, 4, 100, 64, **HALF), backend="triton").kernels.startswith("none")


def test_the_version_of_triton_is_explained(machine: Callable[..., None]) -> None:
    machine(triton_release=(3, 5))
    found = flashjvp.explain(*qkv(1, 2, 100, 64, **HALF), backend="triton")
    assert found.kernels == "portable"
    assert "Triton 3.6" in found.why_not_faster[0] and "Install a Triton" in found.why_not_faster[0]


def not_served() -> Iterator[tuple[str, dict[str, Any], str]]:
    q, k, v = qkv(2, 4, 100, 64, **HALF)
    mask = torch.empty(100, 100, device="meta")
    yield "tangent of a mask", {"attn_mask": mask, "attn_mask_t": mask}, "a tangent of the mask"
    yield "mask of queries", {"attn_mask": mask[:, :1]}, "an additive mask of one key for all"
    yield "scale", {"scale": -0.3}, "not positive, -0.3"
    yield "batch dims", {name: x[None] for name, x in zip("qkv", (q, k, v), strict=True)}, "2 batch dims"
    yield "v_t alone", {"v_t": v}, "a tangent of v alone, for which the portable kernels are faster"


def served_on_copies() -> Iterator[tuple[str, dict[str, Any], str]]:
    _, k, v = qkv(2, 4, 100, 64, **HALF)
    yield "values", {"v": torch.empty(2, 4, 100, 70, **HALF)}, "Dv=70 is not a multiple of 8: each call copies"
    yield "multiple of 8", dict(zip("qkv", qkv(2, 4, 100, 70, **HALF), strict=True)), "D=70 is not a multiple of 8"
    yield "columns", {"k": k.mT.contiguous().mT}, "k is not contiguous, its stride is 100: each call copies it"
    yield "broadcast", {"v": v[:1].expand_as(v)}, "v is broadcast, its strides are [0, 6400, 64, 1]"
    rows = torch.empty(2, 4, 100, 68, **HALF)[..., :64]
    yield "rows", {"q": rows}, "rows of q are [54400, 13600, 136] bytes apart, which 16 does not divide"


@pytest.mark.parametrize(("change", "words"), [pytest.param(*case[1:], id=case[0]) for case in not_served()])
def test_what_keeps_the_warp_specialised_kernels_off_is_named(change: dict[str, Any], words: str) -> None:
    arguments = {**dict(zip("qkv", qkv(2, 4, 100, 64, **HALF), strict=True)), **change}
    with every_release_verified():
        found = flashjvp.explain(**arguments, backend="triton")
    assert found.kernels == "portable"
    assert len(found.why_not_faster) == 1 and words in found.why_not_faster[0]


@pytest.mark.parametrize(("change", "words"), [pytest.param(*case[1:], id=case[0]) for case in served_on_copies()])
def test_copies_and_how_to_avoid_them_are_named(change: dict[str, Any], words: str) -> None:
    arguments = {**dict(zip("qkv", qkv(2, 4, 100, 64, **HALF), strict=True)), **change}
    with every_release_verified():
        found = flashjvp.explain(**arguments, backend="triton")
        aligned = flashjvp.explain(*qkv(2, 4, 100, -(-arguments["v"].shape[-1] // 8) * 8, **HALF), backend="triton")
    assert found.kernels == "warp-specialised" and found.tiles == aligned.tiles
    assert len(found.why_not_faster) == 1 and words in found.why_not_faster[0]
    assert found.why_not_faster[0].startswith("the kernels read copies") and "avoids that" in found.why_not_faster[0]


@pytest.mark.parametrize(("d", "dtype", "is_copied"), [
    (1, torch.float16, True), (31, torch.bfloat16, True), (24, torch.float16, False), (31, torch.float32, False)
])  # fmt: skip
def test_narrow_head_dims_are_copied_for_portable_kernels(d: int, dtype: torch.dtype, is_copied: bool) -> None:
    """Those of half types, which read rows element by element where 8 does not divide a head dim."""
    with every_release_verified():
        found = flashjvp.explain(*qkv(2, 4, 100, d, device="meta", dtype=dtype), backend="triton")
    assert found.kernels == "portable"
    assert any(f"D={d} is not a multiple of 8" in reason for reason in found.why_not_faster) == is_copied


def test_what_is_seen_beside_masks_decides() -> None:
    """Block masks and windows have warp-specialised kernels, but not with dropout, and windows not beside a mask."""
    block_mask: Any = create_block_mask(lambda b, h, i, j: j <= i, None, None, 100, 100, device="cpu").to("meta")
    arguments: Any = {**dict(zip("qkv", qkv(2, 4, 100, 64, **HALF), strict=True)), "backend": "triton"}
    with every_release_verified():
        listed = flashjvp.explain(**arguments, attn_mask=block_mask, is_causal=True)
        dropped = flashjvp.explain(**arguments, attn_mask=block_mask, dropout_p=0.5)
        window = flashjvp.explain(**arguments, window=(3, 4))
        masked = flashjvp.explain(**arguments, window=(3, 4), attn_mask=torch.empty(100, 100, device="meta") > 0)
    assert listed.kernels == "warp-specialised" and listed.tiles.keys() >= {"forward", "backward_query"}
    assert (dropped.kernels, dropped.why_not_faster) == ("portable", ("dropout",))
    assert window.kernels == "warp-specialised" and window.tiles.keys() == listed.tiles.keys()
    assert (masked.kernels, masked.why_not_faster) == ("portable", ("a mask beside a window",))


@pytest.mark.parametrize("d", [128, 160])
def test_a_backward_pass_of_o_alone_is_explained_where_other_kernels_serve_it(d: int) -> None:
    """Those of head dims above 128 are for calls with tangents."""
    with every_release_verified():
        found = flashjvp.explain(*qkv(2, 4, 100, d, **HALF), *qkv(2, 4, 100, d, **HALF), backend="triton")
    assert found.kernels == "warp-specialised" and len(found.why_not_faster) == (d > 128)
    assert all("a backward pass of o alone gets the portable kernels" in reason for reason in found.why_not_faster)


def test_an_address_that_16_bytes_do_not_divide_is_named() -> None:
    memory = torch.empty(3, 2 * 4 * 10 * 64 + 8, dtype=torch.float16)
    q, k, v = (row[4:-4].view(2, 4, 10, 64) for row in memory)
    call, cotangent = Call(q.clone(), k, v, None, False), torch.empty(()).half().expand(2, 4, 10, 64)
    assert eligibility.misfit(call, Inputs(q.clone(), k.clone(), v.clone()), ()) is None
    assert "k.clone() avoids that" in str(eligibility.misfit(call, Inputs(q.clone(), k, v.clone()), ()))
    inputs = Inputs(q.clone(), k.clone(), v.clone())
    assert "the gradient of o is broadcast" in str(eligibility.misfit(call, inputs, (cotangent,)))


def test_several_reasons_are_all_named(machine: Callable[..., None]) -> None:
    machine(triton_release=(3, 5))
    found = flashjvp.explain(*qkv(2, 4, 100, 64, **HALF), scale=-0.3, backend="triton")
    assert ["Triton" in reason for reason in found.why_not_faster] == [True, False]


def test_a_measured_pair_is_told_from_others(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    served = EXPLAIN._Served("triton", "warp-specialised", {}, [])
    q: Any = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
    for row, capability in ((row, c) for row in support.TABLE for c in ((9, 0), (9, 1))):
        found = support.Versions(f"{row.torch}+cu130", row.triton, "3.11.7", "0.1.0")
        monkeypatch.setattr(support, "installed", lambda found=found: found)
        machine(capability=capability, device_name="a GPU")
        explanation = EXPLAIN._explanation(served, q, None)
        assert explanation.measured == (row.gpu == support.MEASURED and capability == (9, 0))
        assert ("yes" in str(explanation)) == explanation.measured
        assert explanation.versions["device"] == f"cuda:0 (a GPU, compute capability 9.{capability[1]})"
        assert "flashjvp has nothing faster" in str(explanation)


def test_it_takes_what_attention_jvp_takes() -> None:
    of_call, of_explain = (inspect.signature(f).parameters for f in (flashjvp.attention_jvp, flashjvp.explain))
    assert of_call == of_explain


@contextlib.contextmanager
def watched() -> Iterator[dict[str, dict[str, int]]]:
    """The tile of each family of portable kernels that is launched."""
    launched: dict[str, dict[str, int]] = {}

    def launch(original: Callable[..., None], *given: Any, **constants: Any) -> None:
        _, _, family, *_ = given
        tile = schedule.Tile(*constants["TILE"], constants["warps"], constants["stages"])
        launched[family] = {name: size for name, size in tile._asdict().items() if size}
        original(*given, **constants)

    with replaced.launch(launch):
        yield launched


@interpreted
@pytest.mark.parametrize("learned", ["mask", "tangent", ""])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_the_tiles_of_masks_and_dropout_are_those_that_are_launched(learned: str, dropout_p: float) -> None:
    q, k, v = (torch.randn(1, 1, 9, 16, requires_grad=True) for _ in range(3))
    mask = torch.randn(9, 9, requires_grad=learned == "mask")
    tangents = {f"{name}_t": x.detach() for name, x in (("q", q), ("k", k), ("v", v))}
    tangents["attn_mask_t"] = torch.randn(9, 9, requires_grad=learned == "tangent")
    call = {"attn_mask": mask, "dropout_p": dropout_p, "backend": "triton", **tangents}
    state = torch.get_rng_state()
    explained = flashjvp.explain(q, k, v, **call)
    assert torch.equal(torch.get_rng_state(), state)
    with watched() as launched:
        o, o_t = flashjvp.attention_jvp(q, k, v, **call)
        (o + o_t).sum().backward()
    assert explained.tiles == launched and ("backward_bias" in launched) == bool(learned)


def test_dropout_keeps_the_warp_specialised_kernels_off() -> None:
    with every_release_verified():
        found = flashjvp.explain(*qkv(2, 4, 100, 64, **HALF), dropout_p=torch.tensor(0.1), backend="triton")
    assert found.kernels == "portable" and found.why_not_faster[0].startswith("dropout")


def test_dropout_and_a_masks_tangent_have_forward_tiles_of_their_own() -> None:
    q, k, v = qkv(2, 4, 100, 128, **HALF)
    mask = torch.empty(100, 100, **HALF)

    def tile(**options: Any) -> dict[str, int]:
        return dict(flashjvp.explain(q, k, v, q, k, v, backend="triton", **options).tiles["forward"])

    plain = tile(scale=-0.3)  # which portable kernels serve, too
    assert tile(attn_mask=mask, attn_mask_t=mask) == tile(dropout_p=0.1) != plain
    own = schedule.WITH_OPTIONS["sm_90", "half", "forward", 128]
    assert tile(dropout_p=0.1) == own._asdict()
    assert plain == schedule.TABLES["sm_90"]["half"]["forward"][128]._asdict()


@interpreted
@pytest.mark.parametrize("d", [64, 72])
@pytest.mark.parametrize("tangents", ["qkv", ""])
def test_the_tiles_are_those_that_are_launched(d: int, tangents: str) -> None:
    """The portable kernels, in the interpreter."""
    cotangents = ("o", "o_t") if tangents else ("o",)
    case = Case(
        "tiles", batch=(1,), q_heads=1, kv_heads=1, m=9, n=9, d=d, dv=d, tangents=(*tangents,), cotangents=cotangents
    )
    inputs = make_inputs(case, torch.float32)
    with watched() as launched:
        run(inputs, "triton")
    explained = flashjvp.explain(
        inputs.q, inputs.k, inputs.v, inputs.q_t, inputs.k_t, inputs.v_t, scale=inputs.c, backend="triton"
    )
    assert explained.tiles == launched


@interpreted
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "sums"])
@pytest.mark.parametrize("name", ["ragged_64", "ragged_128", "plain_72", "ragged_96", "mask_72"])
def test_the_families_are_those_that_are_launched(name: str, ordered: bool) -> None:
    """The warp-specialised kernels, in the emulator."""
    inputs = make_inputs(next(case for case in CASES if case.name == name), torch.float32)
    with emulated(), pipelines_in_use(ordered) as launched:
        run(inputs, "triton")
        found = flashjvp.explain(
            inputs.q, inputs.k, inputs.v, inputs.q_t, inputs.k_t, inputs.v_t, inputs.mask, scale=inputs.c,
            backend="triton",
        )  # fmt: skip
    assert found.kernels == "warp-specialised" and set(found.tiles) == set(launched)


@pytest.mark.gpu
def test_a_call_on_a_gpu_is_explained() -> None:
    q, k, v = qkv(1, 2, 256, 64, device="cuda", dtype=torch.bfloat16)
    found = flashjvp.explain(q, k, v)
    assert found.backend == select.choose(q.device, q.dtype) and "compute capability" in found.versions["device"]
