"""What `flashjvp.check` returns: findings by module, comparisons with differences, and what follows from them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

# wrong: a number is wrong, and nothing says so. refused: PyTorch raises an error. slow: right, but quadratic in memory,
# or not served by flashjvp. harmless: right here, worth knowing. fine: as it should be.
Severity = Literal["wrong", "refused", "slow", "harmless", "fine"]
SEVERITIES: tuple[Severity, ...] = ("wrong", "refused", "slow", "harmless", "fine")
Verdict = Literal["right", "wrong", "undecided"]


@dataclass(frozen=True)
class Finding:
    """Something in a model that a JVP, or a backward pass through it, has trouble with.

    kind: what it is, such as "layer norm".
    path: the innermost module that does it, such as "blocks.3.attn"; "" is the model itself.
    module: the class of that module.
    severity: "wrong", "refused", "slow", "harmless" or "fine".
    calls: how often in one run of the model.
    advice: what to do, in one line.
    detail: the operator, class or error concerned; "" where the kind says it all.
    """

    kind: str
    path: str
    module: str
    severity: Severity
    calls: int
    advice: str
    detail: str = ""


@dataclass(frozen=True)
class Comparison:
    """A derivative of the model beside central differences in float64.

    what: "JVP", "gradient of the output" or "gradient of the JVP".
    verdict: "right", "wrong", or "undecided" where the differences are too uncertain to tell.
    off: distance to the differences, relative to their size.
    uncertainty: how far the differences may be off themselves, relative to their size.
    """

    what: str
    verdict: Verdict
    off: float
    uncertainty: float


@dataclass(frozen=True)
class Diagnosis:
    """One way of running a model: "as it is", or "within replaced()".

    findings: the severest first.
    comparisons: empty where the model, its JVP or the backward pass raises an error.
    """

    way: str
    findings: tuple[Finding, ...]
    comparisons: tuple[Comparison, ...]

    @property
    def ok(self) -> bool:
        """Whether a JVP and a backward pass through it work and every comparison says "right"."""
        judged = bool(self.comparisons) and all(found.verdict == "right" for found in self.comparisons)
        return judged and not any(found.severity in ("wrong", "refused") for found in self.findings)


@dataclass(frozen=True)
class CheckReport:
    """The result of `flashjvp.check`; `print(report)` shows it as a table.

    detached: whether the gradient through the tangent was left out.
    diagnoses: of the model as it is and, where that was asked for, within `flashjvp.replaced(model)`.
    """

    detached: bool
    diagnoses: tuple[Diagnosis, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Those of the model as it is."""
        return self.diagnoses[0].findings

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Those of the model as it is."""
        return self.diagnoses[0].comparisons

    @property
    def ok(self) -> bool:
        """Whether the model is right: within `replaced()` where that was asked for, else as it is."""
        return self.diagnoses[-1].ok

    def to_dict(self) -> Mapping[str, Any]:
        """The same as plain dicts, lists, strings and numbers, for JSON."""
        ways = [{**asdict(found), "ok": found.ok} for found in self.diagnoses]
        return {"ok": self.ok, "detached": self.detached, "diagnoses": ways}

    def __str__(self) -> str:
        from . import table

        return table.plain(self)
