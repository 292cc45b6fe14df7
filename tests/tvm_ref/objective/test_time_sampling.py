"""The distributions of times: transformed exactly to known distributions, then tested by Kolmogorov-Smirnov."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import logit
from scipy.stats import kstest, norm

from tvm_ref.objective.time_sampling import KINDS, TimeConfig, sample_times
from verify.budget.network_tolerance import SIGNIFICANCE

COUNT = 20_000
SHIFTED = {"gap_mu": 0.3, "gap_sigma": 0.7, "s_mu": -0.9, "s_sigma": 1.4, "t_mu": 0.5, "t_sigma": 0.8}


def draw(seed: int = 0, **fields: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    times = sample_times(TimeConfig(**fields), COUNT, torch.Generator().manual_seed(seed))
    t, s, s2 = (time.double().numpy() for time in times)
    return t, s, s2


def assert_law(sample: np.ndarray, cdf: Any = "uniform") -> None:
    assert kstest(sample, cdf).pvalue > SIGNIFICANCE


def logit_normal(mu: float, sigma: float) -> Any:
    return lambda x: norm.cdf((logit(x) - mu) / sigma)


def given_at_most(upper: np.ndarray, x: np.ndarray, law: Any) -> np.ndarray:
    """P(number <= x given number <= upper): uniform, and independent of `upper`, if x has the truncated law."""
    return law(x) / law(upper)


@pytest.mark.parametrize("kind", ["gap", "gap*"])
@pytest.mark.parametrize("fields", [{}, SHIFTED])
def test_gap(kind: str, fields: dict[str, float]) -> None:
    config = TimeConfig(kind=kind, **fields)  # type: ignore[arg-type]
    t, s, _ = draw(kind=kind, **fields)
    gap, of_s = t - s, logit_normal(config.s_mu, config.s_sigma)
    assert_law(gap, logit_normal(config.gap_mu, config.gap_sigma))
    place = given_at_most(1 - gap, s, of_s)
    assert_law(place)
    assert_law(place[gap > np.median(gap)])


def test_the_default_is_the_published_law() -> None:
    t, s, s2 = draw()
    assert_law(t - s, logit_normal(-0.8, 1))
    assert_law(s2, logit_normal(-0.4, 1))


def test_s2_is_independent_for_gap_star_and_s_otherwise() -> None:
    t, s, s2 = draw(kind="gap*")
    for half in (s > np.median(s), t > np.median(t), t - s > np.median(t - s)):
        assert_law(s2[half], logit_normal(-0.4, 1))
    for kind in set(KINDS) - {"gap*"}:
        _, s, s2 = draw(kind=kind)
        assert np.array_equal(s, s2)


@pytest.mark.parametrize("fields", [{}, SHIFTED])
def test_trunc(fields: dict[str, float]) -> None:
    config = TimeConfig(kind="trunc", **fields)  # type: ignore[arg-type]
    t, s, _ = draw(kind="trunc", **fields)
    assert_law(t, logit_normal(config.t_mu, config.t_sigma))
    place = given_at_most(t, s, logit_normal(config.s_mu, config.s_sigma))
    assert_law(place)
    assert_law(place[t > np.median(t)])


@pytest.mark.parametrize("fields", [{}, SHIFTED])
def test_clamp(fields: dict[str, float]) -> None:
    config = TimeConfig(kind="clamp", **fields)  # type: ignore[arg-type]
    t, s, _ = draw(kind="clamp", **fields)
    of_s = logit_normal(config.s_mu, config.s_sigma)
    assert_law(t, logit_normal(config.t_mu, config.t_sigma))
    below = s < t
    assert_law(given_at_most(t[below], s[below], of_s))
    clamped = np.random.default_rng(0).uniform(size=COUNT) * (1 - of_s(t)) + of_s(t)  # s1 > t, at random
    assert_law(np.where(below, of_s(s), clamped))


def test_uniform() -> None:
    t, s, _ = draw(kind="uniform")
    assert_law(t, lambda x: x**2)  # the larger of two
    assert_law(s / t)
    assert_law((s / t)[t > np.median(t)])


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_equal_times_leaves_t_and_s2_as_they_are(kind: str) -> None:
    never, sometimes, always = (draw(kind=kind, equal_share=share) for share in (0.0, 0.3, 1.0))
    for times in (sometimes, always):
        assert np.array_equal(times[0], never[0]) and np.array_equal(times[2], never[2])
    assert np.array_equal(always[1], always[0])
    equal = sometimes[1] == sometimes[0]
    assert np.array_equal(sometimes[1][~equal], never[1][~equal])
    drawn = equal[never[0] != never[1]]  # clamped times are equal anyway
    assert_law(np.random.default_rng(0).uniform(size=len(drawn)) * np.where(drawn, 0.3, 0.7) + np.where(drawn, 0, 0.3))


@given(
    kind=st.sampled_from(KINDS),
    mu=st.tuples(*[st.floats(-30, 30)] * 3),
    sigma=st.tuples(*[st.floats(1e-3, 30)] * 3),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_times_are_ordered_and_in_range_whatever_the_law(
    kind: Any, mu: tuple[float, ...], sigma: tuple[float, ...], share: float, seed: int
) -> None:
    laws = dict(zip(("gap_mu", "s_mu", "t_mu", "gap_sigma", "s_sigma", "t_sigma"), (*mu, *sigma), strict=True))
    times = sample_times(TimeConfig(kind=kind, equal_share=share, **laws), 50, torch.Generator().manual_seed(seed))
    assert all(time.dtype == torch.float32 and time.shape == (50,) for time in times)
    assert bool(((times.s >= 0) & (times.s <= times.t) & (times.t <= 1)).all())
    assert bool(((times.s2 >= 0) & (times.s2 <= 1)).all())


def test_the_same_seed_gives_the_same_times() -> None:
    assert all(map(np.array_equal, draw(seed=7), draw(seed=7)))
    assert not np.array_equal(draw(seed=7)[0], draw(seed=8)[0])


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"kind": "gaps"}, "kind"),
        ({"s_sigma": 0.0}, "s_sigma"),
        ({"t_sigma": float("nan")}, "t_sigma"),
        ({"gap_sigma": -1.0}, "gap_sigma"),
        ({"equal_share": 1.1}, "equal_share"),
    ],
)
def test_a_law_that_is_none_is_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: expected .*, got "):
        TimeConfig(**fields)
