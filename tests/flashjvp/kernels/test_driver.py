"""A direct launch gives to C what Triton's public launch gives, with the present tensors.

Triton's own classes, with stand-ins for the driver and for what is compiled.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from triton import knobs  # noqa: E402
from triton.backends.nvidia import driver as nvidia  # noqa: E402
from triton.compiler.compiler import CompiledKernel, LazyDict  # noqa: E402
from triton.runtime import driver  # noqa: E402

from flashjvp import environment  # noqa: E402
from flashjvp.kernels.hopper.descriptors import rows_descriptors  # noqa: E402
from flashjvp.kernels.launch import driver as direct  # noqa: E402
from flashjvp.kernels.launch.driver import Launch, Place  # noqa: E402

STREAM, PROGRAMS = 7, 5


class PyCUtensorMap:
    """Stands for an encoded descriptor; `encodings` counts how many were made."""

    encodings = 0

    def __init__(self, *what: Any) -> None:
        PyCUtensorMap.encodings += 1
        self.what = [list(x) if isinstance(x, tuple) else x for x in what]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PyCUtensorMap) and self.what == other.what

    __hash__ = None  # type: ignore[assignment]


class C:
    """Stands for the launch function in C."""

    def __init__(self) -> None:
        self.given: list[tuple[Any, ...]] = []

    def __call__(self, *args: Any) -> None:
        self.given.append(tuple(list(x) if isinstance(x, tuple) else x for x in args if not _is_hook(x)))


def _is_hook(x: object) -> bool:
    """Hooks that do nothing, and what is made for them, which the public way passes on."""
    return x is None or isinstance(x, (knobs.HookChain, LazyDict))


@pytest.fixture(autouse=True)
def no_gpu() -> Iterator[None]:
    utils = SimpleNamespace(fill_tma_descriptor=PyCUtensorMap, fill_tma_descriptor_tiled=PyCUtensorMap)
    environment.forget()
    stand_in = SimpleNamespace(utils=utils, get_current_device=lambda: 0, get_current_stream=lambda device: STREAM)
    before = vars(driver).copy()
    driver.set_active(stand_in)
    yield
    vars(driver).clear()
    vars(driver).update(before)
    environment.forget()


def compiled(descriptors: int) -> tuple[Any, C]:
    """A compiled kernel of so many descriptors, a pointer, an Operand, a missing one, a number and a constant."""
    signature = {f"x{i}": "tensordesc<bf16[1, 1, 16, 64],L>" for i in range(descriptors)}
    signature |= {"lse": "*fp32", "q": ("*bf16", ("i64", "i64")), "none": "constexpr", "M": "i32", "D": "constexpr"}  # type: ignore[dict-item]
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": [1, 1, 16, 64], "fp4_padded": False}
    metas = [meta] * descriptors
    launch = C()
    launcher = object.__new__(nvidia.CudaLauncher)
    sizes = dict.fromkeys(("global_scratch_size", "profile_scratch_size", "global_scratch_align"), 0)
    sizes |= {"profile_scratch_align": 0, "num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False}
    vars(launcher).update(sizes, gsan_enabled=False, arg_annotations="annotations", kernel_signature="signature")
    launcher.launch = nvidia.wrap_handle_tensordesc(launch, signature, metas)
    kernel = object.__new__(CompiledKernel)
    vars(kernel).update(
        module="module", _module_pid=-1, _run=launcher, function=11, packed_metadata=(4, 1, 0), name="kernel",
        src=SimpleNamespace(signature=signature), metadata=SimpleNamespace(tensordesc_meta=metas),
    )  # fmt: skip
    return kernel, launch


def rows() -> Tensor:
    return torch.empty(1, 2, 32, 64, dtype=torch.bfloat16)


def arguments(tensors: list[Tensor]) -> tuple[list[Any], list[Place]]:
    """What the public launch takes of all tensors but the last two as descriptors, and the places of all."""
    *described, lse, q = tensors
    count = len(described)
    args: list[Any] = [
        *(rows_descriptors(x, 16, (x.shape[-1],))[0] for x in described),
        lse.data_ptr(),
        (q.data_ptr(), (3, 5)),
        None,
        32,
        (64, 64),
    ]
    places = [Place(i, i, None, args[i]) for i in range(count)]
    return args, [*places, Place(count, count), Place(count + 1, count + 1, (3, 5))]


@pytest.mark.parametrize("descriptors", [0, 1, 8])
def test_c_is_given_what_the_public_launch_gives(descriptors: int) -> None:
    kernel, c = compiled(descriptors)
    launch = Launch(kernel, PROGRAMS, *arguments([rows() for _ in range(descriptors + 2)]))
    assert launch._direct is not None
    for _ in range(3):
        tensors = [rows() for _ in range(descriptors + 2)]
        kernel[(PROGRAMS, 1, 1)](*arguments(tensors)[0])
        launch(tensors, [x.data_ptr() for x in tensors], STREAM, direct.is_hooked())
        public, replayed = c.given[-2:]
        assert replayed == public
        assert STREAM in replayed and tensors[-2].data_ptr() in (*replayed, *replayed[-1])


def test_a_descriptor_is_encoded_once_an_address() -> None:
    kernel, _ = compiled(2)
    launch = Launch(kernel, PROGRAMS, *arguments([rows() for _ in range(4)]))
    tensors = [rows() for _ in range(4)]
    before = PyCUtensorMap.encodings
    for _ in range(3):
        launch(tensors, [x.data_ptr() for x in tensors], STREAM, direct.is_hooked())
    assert PyCUtensorMap.encodings == before + 2
    other = [rows(), *tensors[1:]]
    launch(other, [x.data_ptr() for x in other], STREAM, direct.is_hooked())
    assert PyCUtensorMap.encodings == before + 3


def test_geometries_do_not_share_encodings() -> None:
    kernel, c = compiled(1)
    wide, x = torch.empty(1, 2, 32, 128, dtype=torch.bfloat16), rows()
    part = wide[..., :64]
    for given in (part, wide.view(1, 2, 64, 64)):  # of one address
        launch = Launch(kernel, PROGRAMS, *arguments([given, x, x]))
        launch([given, x, x], [given.data_ptr(), x.data_ptr(), x.data_ptr()], STREAM, direct.is_hooked())
    assert c.given[0] != c.given[1]


def test_encodings_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "_MOST_ENCODED", 4)
    kernel, _ = compiled(1)
    launch = Launch(kernel, PROGRAMS, *arguments([rows() for _ in range(3)]))
    for address in range(0, 1600, 16):
        launch([rows()] * 3, [address, 16, 16], STREAM, direct.is_hooked())
    (encoder,) = direct._ENCODERS.values()
    assert 0 < len(encoder) <= 4


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_launch_hooks_are_passed_on(hook: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, c = compiled(1)
    tensors = [rows() for _ in range(3)]
    launch = Launch(kernel, PROGRAMS, *arguments(tensors))

    def seen(metadata: object) -> None:
        raise AssertionError("C calls it, and here is no C")

    monkeypatch.setattr(knobs.runtime, hook, seen)
    launch(tensors, [x.data_ptr() for x in tensors], STREAM, direct.is_hooked())
    assert seen in c.given[-1]


CHANGES: dict[str, Callable[[Any], None]] = {
    "a launcher of another kind": lambda kernel: setattr(kernel, "_run", SimpleNamespace(launch=lambda *args: None)),
    "scratch memory": lambda kernel: setattr(kernel._run, "global_scratch_size", 8),
    "instrumentation": lambda kernel: setattr(kernel._run, "gsan_enabled", True),
    "a closure with other names": lambda kernel: setattr(kernel._run, "launch", lambda *args: None),
    "descriptors that the kernel takes apart": lambda kernel: setattr(kernel.metadata, "tensordesc_meta", [None]),
    "no signature": lambda kernel: delattr(kernel.src, "signature"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_this_does_not_know_takes_the_public_way(name: str) -> None:
    kernel, _ = compiled(1)
    CHANGES[name](kernel)
    assert Launch(kernel, PROGRAMS, *arguments([rows() for _ in range(3)]))._direct is None
