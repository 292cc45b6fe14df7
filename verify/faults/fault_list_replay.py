"""The planted bugs of replayed calls and direct launches."""

from .fault import Fault

REPLAY, DIRECT = "kernels/launch/replay.py", "kernels/launch/driver.py"


def _repeated(name: str, file: str, marker: str, statement: str, case: str = "hopper_heads") -> Fault:
    return Fault(name, "repeated calls", file, marker, statement, case, "replayed")


OF_REPLAY = [
    _repeated(
        "replayed with the addresses of an earlier call", REPLAY, "addresses",
        "addresses = vars(self).setdefault('first', _addresses(tensors)).copy()",
    ),
    _repeated(
        "first argument taken for the second", REPLAY, "places.append",
        "places.append(Place(position, max(self._addresses.index(address), 1), strides, descriptor))",
    ),
    _repeated("replayed at any alignment", REPLAY, "if self _launches", "if not self._launches:"),
    _repeated("zeros not written", REPLAY, "made.zero_", "pass", "hopper_cotangent_o"),
    _repeated(
        "replayed with the options of an earlier call", REPLAY, "key",
        "key = function, q.shape, k.shape, pattern, _state(q.dtype, q.device)",
    ),
    _repeated(
        "results contiguous whatever was captured", REPLAY, "return shape strides",
        "return lambda shape, strides, dtype: torch.empty(shape, dtype=dtype, device=device)",
    ),
    _repeated("guard of tensors ignored", "_torch/guards.py", "if guard check", "if guard:"),
    _repeated(
        "every head taken for the first", DIRECT, "values[position] (1)",
        "values[position] = addresses[source] if strides is None else (addresses[source], (strides[0], *(3,) * "
        "2))",
        "short_heads",
    ),
    _repeated(
        "descriptors found by geometry alone", DIRECT, "values[position] (2)",
        "values[position] = encoder[next(iter(encoder), addresses[source])]",
    ),
    _repeated(
        "encoders shared by tiles of other sizes", DIRECT, "geometry",
        "geometry = repr((descriptor.shape, descriptor.strides))",
    ),
    _repeated(
        "encoders shared by tensors of other strides", DIRECT, "geometry",
        "geometry = repr((descriptor.shape, signature, meta))",
    ),
]  # fmt: skip
