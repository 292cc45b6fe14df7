"""What a row of `python -m bench.host` is, and the table of such rows."""

from dataclasses import dataclass, fields

import pandas as pd

from .tables import markdown


@dataclass(frozen=True, kw_only=True)
class HostTime:
    """A call, or a part of it alone, and how long it takes the host until it returns.

    `call` is a mode of reports.schema; `fwd, node`, where gradients will be asked for; `func.jvp`, a forward under that
    transform; or `bwd, of a layer`, a backward pass through a chain of `count` calls, divided by their number. `part`
    is `all`; `buffers`, the tensors that the call allocates; `launches`, of kernels; `driver`, what Triton's C code and
    the driver take of them; `empty`, what PyTorch takes for such a call of a function that does nothing; or `sdpa`,
    PyTorch's own attention, by the backend of its choice. Backward passes run in a thread of PyTorch's for each GPU;
    `one thread` and `empty, one thread` run in the one that asks for them. `count` is how many buffers or launches
    there are. Medians and percentiles over batches, in microseconds. Of `all` also `device_us`, the GPU's time of a
    replay from a CUDA graph, and `latency_us`, what a sweep calls the latency; medians.
    """

    call: str
    mask: str
    part: str
    batch: int
    heads: int
    queries: int
    head_dim: int
    dtype: str
    count: int
    p20_us: float
    p50_us: float
    p80_us: float
    device_us: float | None
    latency_us: float | None
    host: str
    machine: str
    torch_version: str
    triton_version: str
    commit: str


HOST_COLUMNS = tuple(field.name for field in fields(HostTime))


def host_table(data: pd.DataFrame) -> str:
    """A line for each call: `data` has the columns HOST_COLUMNS, all rows of one run."""
    lines, first = [], data.iloc[0]
    shape = _shape(first)
    for (call, mask), rows in data.groupby(["call", "mask"], sort=False):
        parts = rows.set_index("part")
        time = {part: f"{us:.0f}" for part, us in parts.p50_us.items()}
        whole = parts.loc["all"]
        name = call if mask == "none" else f"{call}, {mask} mask"
        if (here := _shape(whole)) != shape:
            name += f" ({here})"
        beside = " / ".join(time[name] for name in ("empty", "sdpa") if name in time)
        launches = f"{time['launches']} ({time['driver']}), {parts['count']['launches']}" if "launches" in time else ""
        device, latency = (f"{x:.0f}" if pd.notna(x) else "" for x in (whole.device_us, whole.latency_us))
        one = " / ".join(time[name] for name in ("one thread", "empty, one thread") if name in time)
        lines.append([name, time["all"], beside, one, time.get("buffers", ""), launches, device, latency])
    heads = ["call", "all, us", "PyTorch's own", "both in one thread", "buffers", "launches (driver), how many"]
    heads += ["GPU alone", "latency"]
    source = f"B, H, N, D = {shape}, {first['dtype']}; {first['machine']}, {first['host']}; torch "
    source += f"{first['torch_version']}, triton "
    source += f"{first['triton_version']}, commit {first['commit']}. By `python -m bench.host`."
    return f"{markdown(heads, lines, left=1)}\n\n{source}"


def _shape(row: pd.Series) -> str:
    return ", ".join(f"{row[name]}" for name in ("batch", "heads", "queries", "head_dim"))
