"""The sampler and the cycle error with a flow map known exactly: that of data N(0, SIGMA^2) on the straight path."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tvm_ref.objective.loss import OBJECTIVES
from tvm_ref.objective.path import per_image
from tvm_ref.sampling.sampler import cycle_error, sample, steps_of
from verify.budget.network_tolerance import accumulated_rounding, relative_error

SIGMA = 0.5


def width(t: Tensor) -> Tensor:
    """Standard deviation of x_t; the flow map multiplies x_t by width(s) / width(t)."""
    return torch.sqrt((1 - t) ** 2 * SIGMA**2 + t**2)


class Exact:
    """The network of that flow map; `w` divides its output (the scaled form), `error` is added to it where t > s."""

    def __init__(self, w: float = 1.0, error: float = 0.0) -> None:
        self.w, self.error = w, error
        self.calls: list[tuple[float, float, Tensor, Tensor | None, torch.dtype]] = []

    def __call__(self, x: Tensor, t: Tensor, s: Tensor, labels: Tensor, beta: Tensor | None = None) -> Tensor:
        self.calls.append((t[0].item(), s[0].item(), labels, beta, x.dtype))
        slope = ((1 - t) * -(SIGMA**2) + t) / width(t) ** 2
        apart = s != t
        F = torch.where(apart, (width(s) / width(t) - 1) / torch.where(apart, s - t, 1), slope)
        return x * per_image(F + self.error * apart) / self.w


def noise(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 1, 2, 2, dtype=dtype, generator=torch.Generator().manual_seed(0))


LABELS = torch.arange(5)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(("w", "scaled"), [(1.0, False), (2.0, True), (3.0, False)])
def test_the_exact_flow_map_takes_noise_to_data_in_any_number_of_steps(steps: int, w: float, scaled: bool) -> None:
    x0 = sample(Exact(w if scaled else 1.0), noise(), LABELS, w, steps, scaled)  # type: ignore[arg-type]
    roundings = 12 * steps / SIGMA  # a dozen a step, relative to an x that shrinks to SIGMA of the noise
    assert relative_error([x0], [SIGMA * noise()]) <= accumulated_rounding(int(roundings), torch.float64)


def test_the_network_sees_the_times_the_labels_and_the_inverse_guidance() -> None:
    network = Exact()
    result = sample(network, noise(torch.float32), LABELS, 2.0, 3, True)  # type: ignore[arg-type]
    grid = torch.linspace(1, 0, 4, dtype=torch.float64).float().tolist()
    assert [call[:2] for call in network.calls] == list(pairwise(grid))
    for _, _, labels, beta, dtype in network.calls:
        assert labels is LABELS and dtype == torch.float32
        assert beta is not None and torch.equal(beta, torch.full((5,), 0.5))
    assert result.dtype == torch.float32
    sample(network, noise(), LABELS, 2.0, 1, True, guidance=False)  # type: ignore[arg-type]
    assert network.calls[-1][3] is None


def test_the_state_is_kept_in_float64() -> None:
    """Steps too small for float32 to see add up."""
    steps, tiny = 64, 2.0**-26

    def network(x: Tensor, t: Tensor, *_: Any) -> Tensor:
        return torch.full_like(x, -tiny * steps)

    x = sample(network, torch.ones(1, 1, 1, 1), LABELS[:1], 1.0, steps, False)  # type: ignore[arg-type]
    assert x.item() == 1 + tiny * steps


def test_the_cycle_error_is_that_of_the_way_out_for_the_exact_flow_map() -> None:
    coarse, fine = (cycle_error(Exact(2.0), noise(), LABELS, 2.0, 0.8, n, True) for n in (16, 32))  # type: ignore[arg-type]
    assert coarse.shape == (5,) and coarse.dtype == torch.float64
    assert bool((fine < coarse / 3).all())  # Heun's method: a quarter, but for higher orders
    assert bool((fine > 0).all())


def test_the_cycle_error_shows_a_jump_that_disagrees_with_the_velocity() -> None:
    error, t = 0.1, 0.8
    x0 = noise()
    found = cycle_error(Exact(error=error), x0, LABELS, 1.0, t, 64, False)  # type: ignore[arg-type]
    clean = cycle_error(Exact(), x0, LABELS, 1.0, t, 64, False)  # type: ignore[arg-type]
    x_t = x0 * width(torch.tensor(t, dtype=torch.float64)) / SIGMA
    rms = (t * error * x_t).square().flatten(1).mean(1).sqrt()  # what the wrong jump adds
    # the way out is off by at most `clean` on the way back, and so is x_t, to first order
    assert bool(((found - rms).abs() <= (1 + error) * clean * (1 + error)).all())


@pytest.mark.parametrize(("w", "steps", "named"), [(0.0, 1, "w"), (-1.0, 1, "w"), (2.0, 0, "steps")])
def test_what_is_no_sampling_is_refused(w: float, steps: int, named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected .*, got "):
        sample(Exact(), noise(), LABELS, w, steps, True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{named}: expected .*, got "):
        cycle_error(Exact(), noise(), LABELS, w, 0.5, steps, True)  # type: ignore[arg-type]


@pytest.mark.parametrize("t", [0.0, 1.5])
def test_a_cycle_needs_a_time(t: float) -> None:
    with pytest.raises(ValueError, match=r"^t: expected .*, got "):
        cycle_error(Exact(), noise(), LABELS, 1.0, t, 2, True)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["jumps", "velocity", "restarts"])
def test_each_kind_of_steps_asks_for_what_its_objective_trains(kind: Any) -> None:
    network: Any = Exact()
    sample(network, noise(), LABELS, 1.0, 2, False, kind=kind, new_noise=lambda n: noise())
    ends = {"jumps": [0.5, 0.0], "velocity": [1.0, 0.5], "restarts": [0.0, 0.0]}[kind]
    assert [call[:2] for call in network.calls] == list(zip([1.0, 0.5], ends, strict=True))


def test_steps_along_the_velocity_and_restarts_end_where_they_should() -> None:
    """Of the exact flow map: an Euler step by hand; a restart keeps the jump's end and adds the new noise."""
    network: Any = Exact()
    x, again = noise(), noise().flip(0)
    slope = ((1 - 0.5) * -(SIGMA**2) + 0.5) / ((1 - 0.5) ** 2 * SIGMA**2 + 0.25)
    expected = (x - 0.5 * x) * (1 - 0.5 * slope)  # the velocity at t = 1 is x itself
    found = sample(network, x, LABELS, 1.0, 2, False, kind="velocity")
    asked: list[int] = []

    def new_noise(number: int) -> Tensor:
        asked.append(number)
        return again

    restarted = sample(network, x, LABELS, 1.0, 2, False, kind="restarts", new_noise=new_noise)
    from_half = SIGMA / width(torch.tensor(0.5, dtype=torch.float64))
    back = (0.5 * SIGMA * x + 0.5 * again) * from_half
    assert relative_error([found, restarted], [expected, back]) <= accumulated_rounding(48, torch.float64)
    assert asked == [1]
    with pytest.raises(ValueError, match="new_noise"):
        sample(network, x, LABELS, 1.0, 2, False, kind="restarts")


def test_every_objective_has_its_kind_of_steps() -> None:
    kinds = {objective: steps_of(objective) for objective in OBJECTIVES}
    others = dict.fromkeys(("tvm", "meanflow", "imf", "shortcut"), "jumps")
    assert kinds == {"flow": "velocity", "scm": "restarts", **others}
