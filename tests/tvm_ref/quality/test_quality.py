"""Metrics against closed forms, brute force and the definitions of their papers."""

import itertools
import pickle
from pathlib import Path

import numpy as np
import pytest
import sklearn
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tvm_ref.data.digits import real_digits
from tvm_ref.data.safe_pickle import UnsafePickleError
from tvm_ref.quality.digit_classifier import DigitJudge
from tvm_ref.quality.inception import DetectorError, InceptionDetector
from tvm_ref.quality.metrics import Moments, frechet_distance, precision_recall, wasserstein2
from tvm_ref.quality.reference import ReferenceFileError, load_moments
from verify.budget.metric_tolerance import frechet_bound, single_precision_bound, wasserstein_bound

SEEDS = st.integers(0, 2**32)


def cross(mean: np.ndarray, deviations: np.ndarray) -> torch.Tensor:
    """2 d points with this mean and, exactly, the diagonal (unbiased) covariance deviations^2."""
    d = len(mean)
    arms = np.diag(deviations) * np.sqrt((2 * d - 1) / 2)
    return torch.from_numpy(np.concatenate([mean + arms, mean - arms]))


@given(seed=SEEDS, d=st.integers(1, 6))
def test_frechet_distance_of_gaussians_with_diagonal_covariances(seed: int, d: int) -> None:
    random = np.random.default_rng(seed)
    mean, other_mean = random.standard_normal((2, d))
    deviations, other = random.random((2, d)) * 3
    exact = ((mean - other_mean) ** 2).sum() + ((deviations - other) ** 2).sum()
    bound = frechet_bound(d, (mean**2).sum() + (other_mean**2).sum() + (deviations**2).sum() + (other**2).sum())
    moments = Moments(torch.from_numpy(other_mean), torch.diag(torch.from_numpy(other**2)))
    for real in (cross(other_mean, other), moments):
        assert abs(frechet_distance(cross(mean, deviations), real) - exact) <= bound


@given(seed=SEEDS)
def test_frechet_distance_of_gaussians_with_any_covariance(seed: int) -> None:
    """Against tr (C1 C2)^(1/2) as the sum of singular values of C1^(1/2) C2^(1/2)."""
    random = np.random.default_rng(seed)
    x, y = random.standard_normal((2, 40, 4)) @ random.standard_normal((2, 4, 4)) + random.standard_normal((2, 1, 4))
    roots = []
    for points in (x, y):
        value, vector = np.linalg.eigh(np.cov(points, rowvar=False))
        roots.append(vector * np.sqrt(np.maximum(value, 0)) @ vector.T)
    shared = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    exact = ((x.mean(0) - y.mean(0)) ** 2).sum() + sum((root**2).sum() for root in roots) - 2 * shared
    got = frechet_distance(torch.from_numpy(x), torch.from_numpy(y))
    assert abs(got - exact) <= frechet_bound(4, float((x**2).sum(1).mean() + (y**2).sum(1).mean()))


@given(seed=SEEDS, n=st.integers(2, 6))
def test_wasserstein_distance_is_the_best_assignment(seed: int, n: int) -> None:
    x, y = np.random.default_rng(seed).standard_normal((2, n, 2))
    cost = ((x[:, None] - y) ** 2).sum(-1)
    best = min(cost[np.arange(n), list(order)].mean() for order in itertools.permutations(range(n)))
    scale = float(np.linalg.norm(np.concatenate([x, y]), axis=1).max())
    assert abs(wasserstein2(torch.from_numpy(x), torch.from_numpy(y)) - np.sqrt(best)) <= wasserstein_bound(2, scale)


@given(seed=SEEDS)
def test_wasserstein_distance_of_a_shifted_and_of_a_repeated_set(seed: int) -> None:
    x = torch.randn(30, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    shift = torch.tensor([0.3, -0.4, 1.2], dtype=torch.float64)  # of length 1.3
    bound = wasserstein_bound(3, float(x.norm(dim=1).max()) + 1.3)
    assert abs(wasserstein2(x, x + shift) - 1.3) <= bound
    assert wasserstein2(x, x.flip(0).repeat(2, 1)) <= bound


@given(seed=SEEDS, neighbours=st.integers(1, 4))
@settings(max_examples=25)
def test_precision_and_recall_by_their_definition(seed: int, neighbours: int) -> None:
    random = np.random.default_rng(seed)
    generated, real = random.standard_normal((20, 3)), random.standard_normal((30, 3)) * 1.5

    def covered(points: np.ndarray, by: np.ndarray) -> float:
        hits = []
        for point in points:
            radii = [np.sort(np.linalg.norm(by - center, axis=1))[neighbours] for center in by]  # [0] is the centre
            hits.append(any(np.linalg.norm(point - c) <= r for c, r in zip(by, radii, strict=True)))
        return float(np.mean(hits))

    with sklearn.config_context(working_memory=1 / 1024):  # a KiB: a few rows of distances at a time
        got = precision_recall(torch.from_numpy(generated), torch.from_numpy(real), neighbours)
    assert got == (covered(generated, real), covered(real, generated))


def test_precision_and_recall_of_extremes() -> None:
    x = torch.randn(50, 4)
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x + 100, x) == (0, 0)
    half = torch.cat([x, x + 100])
    assert precision_recall(x, half) == (1, 0.5) and precision_recall(half, x) == (0.5, 1)


@pytest.mark.parametrize("metric", [frechet_distance, wasserstein2, precision_recall])
def test_metrics_refuse_what_they_cannot_compare(metric) -> None:
    good = torch.randn(9, 3)
    broken = good.clone()
    broken[2, 1] = torch.nan
    for bad in (broken, good[:1], good[0], good.to(torch.int64), good[:, :2]):
        for pair in ((good, bad), (bad, good)):
            with pytest.raises(ValueError, match="expected"):
                metric(*pair)


def test_moments_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="moments of 3 features"):
        frechet_distance(torch.randn(9, 3), Moments(torch.zeros(2), torch.eye(2)))
    with pytest.raises(ValueError, match="more than 3 vectors"):
        precision_recall(torch.randn(3, 2), torch.randn(9, 2))


@pytest.fixture(scope="module")
def judge() -> DigitJudge:
    return DigitJudge()


def real_samples() -> tuple[torch.Tensor, torch.Tensor]:
    digits = real_digits()
    return torch.from_numpy(2 * digits.images - 1)[:, None], torch.from_numpy(digits.labels)


def test_the_judge_knows_digits_that_it_never_saw(judge: DigitJudge) -> None:
    assert judge.held_out_accuracy > 0.98
    assert judge.held_out_accuracy == DigitJudge().held_out_accuracy


def test_real_digits_are_judged_perfect_and_others_are_not(judge: DigitJudge) -> None:
    images, labels = real_samples()
    real = judge.judge(images, labels)
    assert real.accuracy > 0.99 and abs(real.frechet) <= frechet_bound(64, 128)
    assert (real.precision, real.recall, real.variance) == (1, 1, 1)
    wrong = judge.judge(images, (labels + 1) % 10)
    assert wrong.accuracy < 0.02 and wrong.frechet == real.frechet
    assert judge.judge(-images, labels).frechet > 1


def test_a_bootstrap_of_real_digits_is_the_floor(judge: DigitJudge) -> None:
    """About 1/e of the digits are not drawn: some of those are not covered, and the variance is that of a sample."""
    floor = judge.bootstrap(1797, seed=3)
    assert floor == judge.bootstrap(1797, seed=3) != judge.bootstrap(1797, seed=4)
    assert floor.precision == 1 and 0.8 < floor.recall < 1 and 0.95 < floor.variance < 1.05
    assert 0 < floor.frechet < judge.bootstrap(300, seed=3).frechet


def test_digits_that_are_alike_have_no_recall_and_no_variance(judge: DigitJudge) -> None:
    """Halfway between each digit and the mean of its class: a quarter of the variance."""
    images, labels = real_samples()
    means = torch.stack([images[labels == digit].mean(0) for digit in range(10)])
    half = judge.judge((images + means[labels]) / 2, labels)
    assert abs(half.variance - 0.25) <= single_precision_bound(roundings=16, scale=1.0)
    alike = judge.judge(means[labels], labels)
    assert alike.variance <= single_precision_bound(roundings=16, scale=1.0) and alike.recall == 0 < half.recall < 0.5


def test_the_judge_measures_pixels_between_0_and_1(judge: DigitJudge) -> None:
    """A constant image of value p has mean p and no covariance."""
    pixels = torch.from_numpy(real_digits().images).flatten(1).double()
    trace = pixels.var(0).sum()
    for value, shown in ((0.5, 0.75), (-3.0, 0.0), (7.0, 1.0)):
        exact = float(((pixels.mean(0) - shown) ** 2).sum() + trace)
        got = judge.judge(torch.full((10, 1, 8, 8), value), torch.zeros(10, dtype=torch.int64)).frechet
        assert abs(got - exact) <= frechet_bound(64, 128)


def test_the_judge_refuses_what_is_no_digit(judge: DigitJudge) -> None:
    images, labels = real_samples()
    with pytest.raises(ValueError, match="expected samples"):
        judge.judge(images[:, 0], labels)
    with pytest.raises(ValueError, match="expected samples"):
        judge.judge(images, labels[:-1])
    images[3, 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="finite"):
        judge.judge(images, labels)


MU, SIGMA = np.array([1.0, 2.0]), np.array([[2.0, 0.5], [0.5, 1.0]])


def write(path: Path, content: dict, protocol: int = 4) -> Path:
    if path.suffix == ".npz":
        np.savez(path, **content)
    else:
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize(("name", "protocol"), [("r.npz", 0), *(("r.pkl", protocol) for protocol in range(2, 6))])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_reference_statistics_are_read(name: str, protocol: int, dtype: type, tmp_path: Path) -> None:
    content = {"mu": MU.astype(dtype), "sigma": SIGMA.astype(dtype), "images": np.zeros((2, 3), np.uint8)}
    moments = load_moments(write(tmp_path / name, content, protocol))
    assert moments.mean.dtype == moments.covariance.dtype == torch.float64
    assert np.array_equal(moments.mean.numpy(), MU) and np.array_equal(moments.covariance.numpy(), SIGMA)


@pytest.mark.parametrize("name", ["r.npz", "r.pkl"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"mean": MU, "sigma": SIGMA}, "expected mu as a float array with 1 axes, got NoneType; the file holds mean"),
        ({"mu": MU, "sigma": SIGMA[0]}, r"expected sigma as a float array with 2 axes, got float64 \[2\]"),
        ({"mu": MU, "sigma": np.eye(3)}, "mu has 2 numbers, but sigma has shape"),
        ({"mu": MU.astype(int), "sigma": SIGMA}, r"got int64 \[2\]"),
        ({"mu": MU * np.nan, "sigma": SIGMA}, "mu holds values that are not finite"),
    ],
)
def test_bad_reference_statistics_are_refused(name: str, content: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ReferenceFileError, match=message) as caught:
        load_moments(write(tmp_path / name, content))
    assert name in str(caught.value)


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


def test_no_code_of_a_reference_file_is_run(tmp_path: Path) -> None:
    trace = tmp_path / "run"
    (tmp_path / "r.pkl").write_bytes(pickle.dumps({"mu": MU, "sigma": SIGMA, "x": Hostile(trace)}))
    with pytest.raises(UnsafePickleError, match=r"Path"):
        load_moments(tmp_path / "r.pkl")
    np.savez(tmp_path / "r.npz", mu=np.array([Hostile(trace)], dtype=object), sigma=SIGMA)
    with pytest.raises(ReferenceFileError, match="allow_pickle=False"):
        load_moments(tmp_path / "r.npz")
    assert not trace.exists()


@pytest.mark.parametrize("name", ["r.npz", "r.pkl"])
def test_damaged_reference_files_are_named(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, {"mu": MU, "sigma": SIGMA})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=name):
        load_moments(path)
    with pytest.raises(FileNotFoundError, match="none"):
        load_moments(tmp_path / "none.npz")
    (tmp_path / "r.txt").touch()
    with pytest.raises(ReferenceFileError, match=r"ends in \.npz or \.pkl"):
        load_moments(tmp_path / "r.txt")


class Detector(torch.nn.Module):
    """Mean and largest value of each channel, in place of Inception's features."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = images.to(torch.float32).flatten(2)
        features = torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1)
        return features if return_features else features[:, :1]


def save_detector(path: Path, module: torch.nn.Module) -> Path:
    torch.jit.script(module).save(str(path))
    return path


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_the_detector_is_asked_for_features_of_8_bit_images(tmp_path: Path) -> None:
    detector = InceptionDetector(save_detector(tmp_path / "detector.pt", Detector()), torch.device("cpu"))
    images = torch.randint(0, 256, (4, 3, 5, 5), dtype=torch.uint8)
    features = detector.all_features(images.split(3))
    assert features.dtype == torch.float32 and torch.equal(features[:, 3:], images.flatten(2).amax(2).float())
    for bad in (images.float(), images[:, :1], images[0]):
        with pytest.raises(ValueError, match="uint8"):
            detector.features(bad)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_what_is_no_detector_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"fetch https://.*inception-2015-12-05\.pt"):
        InceptionDetector(tmp_path / "none.pt", torch.device("cpu"))
    (tmp_path / "text.pt").write_text("text")
    torch.save({"a": 1}, tmp_path / "weights.pt")
    for name in ("text.pt", "weights.pt"):
        with pytest.raises(DetectorError, match=name):
            InceptionDetector(tmp_path / name, torch.device("cpu"))
    other = InceptionDetector(save_detector(tmp_path / "other.pt", torch.nn.Identity()), torch.device("cpu"))
    with pytest.raises(DetectorError, match=r"other\.pt"):
        other.features(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
