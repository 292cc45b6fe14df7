"""Follows rounding errors through a streaming kernel: what it rounds, and the variance that this gives each result.

A kernel that follows kernels/MATH.md (1)-(20) rounds in known places. To first order an error e of an intermediate
moves a result by (d result / d intermediate) * e. Roundings are taken as independent and of zero mean, so variances
add: the variance of every element of a result is a sum of products of squared matrices. With p significand bits a value
in [2^E, 2^(E+1)) is rounded with variance (2^(E-p))^2 / 3; over a spread of values that is (2^-p)^2 / 3 * 0.541
relative to x^2 (0.541 = mean of 1/s^2, s log-uniform in [1, 2)). What is rounded:

- in float32 (eps^2 = (2^-24)^2 / 3): S, S_t, A, B, every accumulator and row sum (sums of L products in any order: the
  squared partial sums of a random walk with drift), exp2 (hardware's error is 2^-22.5), S - max and S - lse (relative
  to |S| and |lse|: this is what large scores cost). A P below the smallest normal number (1.2e-38) may be flushed to
  zero, which hardware does. mu and lse are kept in float32. Sums of o_t may hold S_t unshifted, and a running shift
  starts from the S_t of any keys;
- in the input type: the tiles p, p (S_t - shift), P, P (S_t - mu), dS_t and dS before their products, and o, o_t and
  the gradients when stored. shift is within about a standard deviation (under P) of mu. Tiles of float32 round so;
- where PyTorch allows TF32, both factors of every product, to 11 bits: those that are inputs, too. An input's rounding
  moves all that it is multiplied with, so it moves a row's lse and mu as well. Tiles may then be float16 in units
  (flashjvp/kernels/hopper/per_tensor_scaling.py), which bounds what the smallest of their numbers lose;
- o and o_t enter a = rowsum(T O), delta = rowsum(G O + T O_t) as stored. The error of a, delta, mu and lse is one
  number a query row: it moves P (A - a) and P (S_t - mu) (A - a) + P (B - delta) over all keys together, which is what
  costs digits where these cancel.

Capitals are the matrices of MATH.md; var_x is the variance of the error of x. noise.py turns variances into bounds.
"""

import math

import torch
from torch import Tensor

from ..cases.inputs import Inputs
from ..oracles.attention import allowed
from .arithmetic import Arithmetic, are_factors_rounded, centered, longest_row, sum_variance
from .noise import Noise, alignment, equal_heads, sources

EXP_VARIANCE = 8.0  # of exp2 on hardware, in units of eps^2: an error of 2^-22.5 at most


def _ratio(x: float, y: float) -> float:
    return x / y if y > 0 else 0.0


class StreamingKernel:
    """A streaming kernel's intermediates in float64 and the variances of their errors, key heads repeated."""

    def __init__(self, inputs: Inputs) -> None:
        q, k, v, q_t, k_t, v_t, G, T = self._operands(inputs)
        self.q, self.k, self.v, self.q_t, self.k_t, self.v_t, self.G, self.T = q, k, v, q_t, k_t, v_t, G, T
        self.c, self.type = inputs.c, Arithmetic.of(inputs.q.dtype, are_factors_rounded(inputs))
        self.groups = q.shape[-3] // max(inputs.k.shape[-3], 1)
        self.alike = equal_heads(q, self.groups)
        c, eps, keep = self.c, self.type.eps, allowed(inputs)
        products = c * (q @ k.mT)
        bias = 0.0 if inputs.mask is None or inputs.mask.dtype == torch.bool else inputs.mask.double()
        S = (products + bias).masked_fill(~keep, -torch.inf)
        self.lse = torch.logsumexp(S, -1, keepdim=True).nan_to_num(neginf=0.0)
        self.P = P = torch.exp(S - self.lse)
        S = S.masked_fill(~keep, 0.0)
        self.S_t = c * (q_t @ k.mT + q @ k_t.mT)
        self.mu = (P * self.S_t).sum(-1, keepdim=True)
        self.z = z = (self.S_t - self.mu).masked_fill(~keep, 0.0)
        self.O = P @ v
        self.O_t = (P * z) @ v + P @ v_t
        length = P.shape[-1] / 3 + 3  # variance of a sum of N like terms, in eps^2 of the sum
        self.var_log = eps * (c**2 * sum_variance(q, k.mT) + 3 * products.square() + S.square() + EXP_VARIANCE)
        self.R = self._unit_of_S_t()
        self.inputs = self._inputs()
        self.var_log += c**2 * self._of_inputs("q", "k")
        self.var_log += torch.lt(P, self.type.smallest).double()  # flushed to zero: all of it is error
        self.var_S_t = eps * (c**2 * (sum_variance(q_t, k.mT) + sum_variance(q, k_t.mT)) + 3 * self.S_t.square())
        self.var_S_t += c**2 * (self._of_inputs("q_t", "k") + self._of_inputs("q", "k_t"))
        W = P.square() * self.var_log
        self.var_lse = W.sum(-1, keepdim=True) + eps * (length + 3 * self.lse.square())
        mu_sum = (1 + P.shape[-1] / 2) * (P * self.S_t).square().sum(-1, keepdim=True) + length * self.mu.square()
        start = z.square().sum(-1, keepdim=True) / keep.sum(-1, keepdim=True).clamp(min=1)
        # S_t less the shift, the step of the shift and their difference, before the largest p is met
        mu_sum += 3 * start
        self.var_mu = (W * z.square() + P.square() * self.var_S_t).sum(-1, keepdim=True) + eps * mu_sum
        self._add_rows_of_inputs()
        self.o = self._o(W, length)
        self.o_t = self._o_t(W, length, eps * mu_sum)
        self._add_score_gradients()

    @staticmethod
    def _operands(inputs: Inputs) -> list[Tensor]:
        heads = inputs.q.shape[-3] // max(inputs.k.shape[-3], 1)
        q, k, v = inputs.q.double(), inputs.k.double(), inputs.v.double()
        like_o = q.new_zeros(*q.shape[:-1], v.shape[-1])
        pairs = ((inputs.q_t, q), (inputs.k_t, k), (inputs.v_t, v), (inputs.d_o, like_o), (inputs.d_o_t, like_o))
        q_t, k_t, v_t, G, T = (torch.zeros_like(like) if x is None else x.double() for x, like in pairs)
        k, v, k_t, v_t = (x.repeat_interleave(heads, dim=-3) for x in (k, v, k_t, v_t))
        return [q, k, v, q_t, k_t, v_t, G, T]

    def _add_rows_of_inputs(self) -> None:
        """A rounding of q or q_t moves the scores of a row together."""
        P, c2, of_q, of_q_t = self.P, self.c**2, self.inputs["q"], self.inputs["q_t"]
        mean, mean_t, spread = P @ self.k, P @ self.k_t, (P * self.z) @ self.k
        self.var_lse = self.var_lse + c2 * (of_q * mean.square()).sum(-1, keepdim=True)
        of_mu = of_q * (mean_t.square() + spread.square()) + of_q_t * mean.square()
        self.var_mu = self.var_mu + c2 * of_mu.sum(-1, keepdim=True)

    def _add_score_gradients(self) -> None:
        """dS and dS_t without the scale, and what they are made of: dS = P inner, dS_t = P D; MATH.md (9)-(14)."""
        G, T = self.G, self.T
        self.a = (T * self.O).sum(-1, keepdim=True)
        self.delta = (G * self.O + T * self.O_t).sum(-1, keepdim=True)
        self.B = G @ self.v.mT + T @ self.v_t.mT
        self.D = torch.where(self.P != 0, T @ self.v.mT - self.a, 0.0)
        self.inner = self.z * self.D + self.B - self.delta
        self.dS, self.dS_t = self.P * self.inner, self.P * self.D

    def _unit_of_S_t(self) -> float:
        """At least the unit of S_t - mu with per-tensor scaling, else 1; without tangents 0."""
        if self.type.factor == 0:
            return 1.0
        q, k, v, q_t, k_t, v_t, G, T = map(longest_row, self._all())
        ratios = [_ratio(v_t, v), _ratio(G, T), 2.0**-15 * _ratio(q_t, q), 2.0**-15 * _ratio(k_t, k)]
        return max(16 * self.c * max(q_t * k, q * k_t), *(2 * x for x in ratios))

    def _all(self) -> tuple[Tensor, ...]:
        return self.q, self.k, self.v, self.q_t, self.k_t, self.v_t, self.G, self.T

    def _inputs(self) -> dict[str, Tensor]:
        """Variances of inputs as factors, in at most the units of the scaled backward (per_tensor_scaling.py)."""
        q, k, v, _, _, _, G, T = map(longest_row, self._all())
        digits = 2.0 ** min(max(math.log2(self.c * q * k) + 15, 0), 8) if self.c * q * k > 0 else 1.0
        q, k, v, G = 2 * q / digits, 2 * k / digits, 16 * v, max(G, self.R * T) / 16
        units = (q, k, v, self.R * q, self.R * k, self.R * v, G, T / 16)
        names = ("q", "k", "v", "q_t", "k_t", "v_t", "G", "T")
        given = zip(names, self._all(), units, strict=True)
        return {name: self.type.of_input(x, unit) for name, x, unit in given}

    def _of_inputs(self, x: str, y: str) -> Tensor:
        """Variance of x @ y.T after rounding both, inputs."""
        if self.type.factor == 0:
            return torch.zeros((), dtype=torch.float64, device=self.q.device)
        x_, y_ = getattr(self, x), getattr(self, y)
        return self.inputs[x] @ y_.square().mT + x_.square() @ self.inputs[y].mT

    def _of_input(self, x: Tensor, y: str, fold: bool = False) -> Tensor:
        """Variance of x @ y after rounding the input y, whose own errors count: equal rows have the same."""
        if self.type.factor == 0:
            return torch.zeros((), dtype=torch.float64, device=self.q.device)
        y_, variance = getattr(self, y), self.inputs[y]
        own = y_ - self.type.rounded(y_)
        if fold:
            variance, own = self.fold(variance), self.fold(own)
        return torch.maximum(x.square() @ variance, (x @ own).square())

    def _query_side(self, value: Tensor, spread: Tensor, shared: Tensor, *factors: Tensor) -> Noise:
        one, stored = torch.ones_like(self.lse[..., 0]), self.type.stored(value)
        return Noise(spread, sources(self.P, -1), shared, one, stored, one.numel(), alignment(*factors))

    def _o(self, W: Tensor, length: float) -> Noise:
        eps, P, v, O = self.type.eps, self.P, self.v, self.O
        spread = centered(W, v, O) + self._p_tiles() @ v.square() + eps * sum_variance(P, v)
        spread += self._of_input(P, "v")
        return self._query_side(O, spread, eps * length * O.square(), v)

    def _o_t(self, W: Tensor, length: float, var_mu_sum: Tensor) -> Noise:
        eps, P, z, v, v_t, O, O_t = self.type.eps, self.P, self.z, self.v, self.v_t, self.O, self.O_t
        # d O_t / d log p_n = P_n (z_n (v_n - O) + v_t_n - O_t)
        spread = centered(W * z.square(), v, O) + centered(W, v_t, O_t)
        spread += centered(P.square() * self.var_S_t, v, O)
        shifted = P * (z.square() + 2 * (P * z.square()).sum(-1, keepdim=True)).sqrt()
        spread += self._forward_tiles(shifted, self.R) @ v.square() + self._p_tiles() @ v_t.square()
        spread += self._of_input(P * z, "v") + self._of_input(P, "v_t")
        spread += eps * (sum_variance(P * self.S_t, v) + self.mu.square() * sum_variance(P, v) + sum_variance(P, v_t))
        shared = var_mu_sum * O.square() + eps * (3 * (self.mu * O).square() + length * O_t.square())
        return self._query_side(O_t, spread, shared, v, v_t)

    def _forward_tiles(self, x: Tensor, unit: float = 1.0) -> Tensor:
        """Variance of a tile that is rounded relative to the largest p of its row, as the forward pass does."""
        return self.type.tiles(x, self.P.amax(-1, keepdim=True) * unit * self.type.lost)

    def _p_tiles(self) -> Tensor:
        """Variance of rounding p itself so; the largest p of a row is 1, which rounding keeps."""
        return self._forward_tiles(self.P).masked_fill(self.P.amax(-1, keepdim=True) == self.P, 0.0)

    def statistics(self) -> dict[str, Noise]:
        """lse and mu: one number a row, never rounded to the input type."""
        one = torch.ones_like(self.lse[..., 0])
        none = torch.zeros_like(self.lse)
        return {
            name: Noise(none, one, variance, one, none, one.numel(), one.new_ones(1))
            for name, variance in (("lse", self.var_lse), ("mu", self.var_mu))
        }

    def gradients(self) -> dict[str, Noise]:
        """The error of each of the six gradients."""
        eps, P, z, v, G, T = self.type.eps, self.P, self.z, self.v, self.G, self.T
        O, O_t, a, delta, B, D, inner = self.O, self.O_t, self.a, self.delta, self.B, self.D, self.inner
        dS, dS_t = self.dS, self.dS_t
        var_o, var_o_t = (x.spread + x.shared + x.stored for x in (self.o, self.o_t))
        width = T.shape[-1]
        var_a = (T.square() * (var_o + eps * (1 + width / 2) * O.square())).sum(-1, keepdim=True)
        var_a += eps * width / 3 * a.square()
        own = eps * (1 + width / 2) * ((G * O).square() + (T * O_t).square()) + T.square() * var_o_t
        var_delta = (G.square() * var_o + own).sum(-1, keepdim=True) + eps * width / 3 * delta.square()
        var_A = eps * sum_variance(T, v.mT) + self._of_inputs("T", "v")
        var_B = eps * (sum_variance(G, v.mT) + sum_variance(T, self.v_t.mT))
        var_B += self._of_inputs("G", "v") + self._of_inputs("T", "v_t")
        of_G, of_T = self.inputs["G"], self.inputs["T"]
        var_a += (of_T * O.square()).sum(-1, keepdim=True)
        var_delta += (of_G * O.square() + of_T * O_t.square()).sum(-1, keepdim=True)
        var_z = self.var_S_t + eps * z.square()
        P2 = P.square()
        var_dS_t = P2 * (self.var_log * D.square() + var_A + 3 * eps * D.square())
        var_dS = P2 * (self.var_log * inner.square() + var_z * D.square() + z.square() * var_A + var_B)
        var_dS += eps * P2 * (3 * (z * D).square() + B.square() + delta.square())
        row_dS_t = self.var_lse * dS_t.square() + var_a * P2
        row_dS = self.var_lse * dS.square() + self.var_mu * dS_t.square() + var_a * (P * z).square() + var_delta * P2
        grads = self._query_gradients(dS, dS_t, var_dS, var_dS_t, var_a, var_delta)
        grads |= self._key_gradients(dS, dS_t, (var_dS, row_dS), (var_dS_t, row_dS_t))
        return grads | self._value_gradients(var_z)

    def _units(self) -> tuple[float, float]:
        """At least the units of dS and of dS_t with per-tensor scaling, else 1."""
        if self.type.factor == 0:
            return 1.0, 1.0
        of_T = longest_row(self.v) * longest_row(self.T)
        return max(longest_row(self.v) * longest_row(self.G), self.R * of_T), of_T

    def _query_gradients(
        self, dS: Tensor, dS_t: Tensor, var_dS: Tensor, var_dS_t: Tensor, var_a: Tensor, var_delta: Tensor
    ) -> dict[str, Noise]:
        eps, P, k, k_t, rounded = self.type.eps, self.P, self.k, self.k_t, self.type.rounded_product
        unit, unit_t = self._units()
        d_q, d_q_t = dS @ k + dS_t @ k_t, dS_t @ k
        spread = var_dS @ k.square() + var_dS_t @ k_t.square() + eps * (sum_variance(dS, k) + sum_variance(dS_t, k_t))
        spread += rounded(dS, k, unit) + rounded(dS_t, k_t, unit_t)
        spread += self._of_input(dS, "k") + self._of_input(dS_t, "k_t")
        shared = self.var_lse * d_q.square() + self.var_mu * d_q_t.square() + var_delta * (P @ k).square()
        shared += var_a * ((P * self.z) @ k + P @ k_t).square()
        spread_t = var_dS_t @ k.square() + eps * sum_variance(dS_t, k) + rounded(dS_t, k, unit_t)
        spread_t += self._of_input(dS_t, "k")
        shared_t = self.var_lse * d_q_t.square() + var_a * (P @ k).square()
        c, c2 = self.c, self.c**2
        return {
            "d_q": self._query_side(c * d_q, c2 * spread, c2 * shared, k, k_t),
            "d_q_t": self._query_side(c * d_q_t, c2 * spread_t, c2 * shared_t, k),
        }

    def _key_side(self, value: Tensor, spread: Tensor, shared: Tensor, *factors: Tensor) -> Noise:
        """Of a sum over a group's query heads: the errors of equal ones add up, where else their variances do."""
        independent = (sources(self.fold(self.P), -2) / self.alike).clamp(min=1)
        spread, shared, rows = self.alike * spread, self.alike * shared, self.lse.numel() // self.alike
        stored = self.type.stored(value)
        return Noise(spread, independent, shared, independent, stored, rows, alignment(*factors))

    def fold(self, x: Tensor) -> Tensor:
        """[..., Hq, M, width] to [..., Hkv, G M, width]: the rows of a group of heads, which its key head sums over."""
        return x.unflatten(-3, (x.shape[-3] // self.groups, self.groups)).flatten(-3, -2)

    def _key_gradients(
        self, dS: Tensor, dS_t: Tensor, noise: tuple[Tensor, Tensor], noise_t: tuple[Tensor, Tensor]
    ) -> dict[str, Noise]:
        eps, c, c2, rounded = self.type.eps, self.c, self.c**2, self.type.rounded_product
        unit, unit_t = self._units()
        q, q_t = self.fold(self.q), self.fold(self.q_t)
        dS, dS_t, var_dS, row_dS, var_dS_t, row_dS_t = (self.fold(x).mT for x in (dS, dS_t, *noise, *noise_t))
        spread_t = var_dS_t @ q.square() + eps * sum_variance(dS_t, q) + rounded(dS_t, q, unit_t)
        spread_t += self._of_input(dS_t, "q", fold=True)
        spread = var_dS @ q.square() + eps * sum_variance(dS, q) + rounded(dS, q, unit)
        spread += var_dS_t @ q_t.square() + eps * sum_variance(dS_t, q_t) + rounded(dS_t, q_t, unit_t)
        spread += self._of_input(dS, "q", fold=True) + self._of_input(dS_t, "q_t", fold=True)
        shared = row_dS @ q.square() + row_dS_t @ q_t.square()
        return {
            "d_k": self._key_side(c * (dS @ q + dS_t @ q_t), c2 * spread, c2 * shared, q, q_t),
            "d_k_t": self._key_side(c * (dS_t @ q), c2 * spread_t, c2 * (row_dS_t @ q.square()), q),
        }

    def _value_gradients(self, var_z: Tensor) -> dict[str, Noise]:
        eps, P2, Pz, rounded = self.type.eps, self.P.square(), self.P * self.z, self.type.rounded_product
        var_P, row_P = P2 * self.var_log, P2 * self.var_lse
        var_Pz = P2 * (self.z.square() * self.var_log + var_z)
        row_Pz = Pz.square() * self.var_lse + P2 * self.var_mu
        P, Pz, var_P, row_P, var_Pz, row_Pz = (
            self.fold(x).mT for x in (self.P, Pz, var_P, row_P, var_Pz, row_Pz)
        )  # fmt: skip
        G, T = self.fold(self.G), self.fold(self.T)
        spread = var_P @ G.square() + var_Pz @ T.square() + eps * (sum_variance(P, G) + sum_variance(Pz, T))
        spread += rounded(P, G) + rounded(Pz, T, self.R)
        spread += self._of_input(P, "G", fold=True) + self._of_input(Pz, "T", fold=True)
        spread_t = var_P @ T.square() + eps * sum_variance(P, T) + rounded(P, T)
        spread_t += self._of_input(P, "T", fold=True)
        return {
            "d_v": self._key_side(P @ G + Pz @ T, spread, row_P @ G.square() + row_Pz @ T.square(), G, T),
            "d_v_t": self._key_side(P @ T, spread_t, row_P @ T.square(), T),
        }
