"""Recursive least squares, numerically sound for ever: linear regression one observation at a time.

Rules:
    1. P is never stored; its factors are: P = U D U', U unit upper triangular, D diagonal and >= 0. So P is
       symmetric to the bit and positive semidefinite, whatever was learned.
    2. What is forgotten of the data is given back to the prior: P <= forgetting**-n * P0 at all times. A
       direction that is no longer excited returns to the prior mean; it does not blow up.
    3. `learn` computes beside the state and commits last: an error leaves the state unchanged.
    4. A state is n*(n+1)/2 + n floats, however much was learned.

Plain floats in lists: one predict and learn of n = 6 took 5.9 us so, 9.6 us with P as nested lists and 6.5 us
in numpy (CPython 3.11, one core); the call overhead of numpy is worth it from n = 7 on.

Notation (P, U, D, x, w, n) follows the sources: Haykin, Adaptive Filter Theory, 4th ed., ch. 9 (exponentially
weighted RLS); Ljung & Soderstrom, Theory and Practice of Recursive Identification, ch. 6 (U-D form);
Bierman, Factorization Methods for Discrete Sequential Estimation, ch. V (its update). Rule 2 is the
stabilised forgetting of Kulhavy & Zarrop, Int. J. Control 58(4), 1993, with one row of the prior per step.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, sqrt
from operator import mul

from extproc.predicting.sums import plain_sum


class RecursiveLeastSquares:
    """The weights w that minimise the forgetting-weighted squared error plus the distance to the prior.

    With `forgetting` 1 this is ridge regression: it minimises
    `sum((y - w.x)**2) + (w - prior_mean)' P0^-1 (w - prior_mean)`.

    Args:
        n: Number of features, >= 1.
        prior_mean: Weights before anything is learned, shape (n,); zeros if None.
        prior_covariance: P0 in units of the variance of the observation noise: a number p for `p * I`, or a
            symmetric positive definite matrix, shape (n, n). The default is AIGW's, a prior that one
            observation outweighs.
        forgetting: Weight of an observation relative to the one after it, in (0, 1]; the memory is about
            `1 / (1 - forgetting)` observations.

    Raises:
        ValueError: An argument is out of its range.
    """

    __slots__ = ("_d", "_forgetting", "_mean", "_n", "_num_learned", "_p0", "_rows", "_u", "_w")

    def __init__(
        self,
        n: int,
        *,
        prior_mean: Sequence[float] | None = None,
        prior_covariance: float | Sequence[Sequence[float]] = 1e6,
        forgetting: float = 1.0,
    ) -> None:
        if n < 1:
            raise ValueError("n must be >= 1")
        if not 0.0 < forgetting <= 1.0:
            raise ValueError("forgetting must be in (0, 1]")
        self._n = n
        self._forgetting = forgetting
        self._mean = _finite_vector("prior_mean", [0.0] * n if prior_mean is None else prior_mean, n)
        self._p0 = _square(prior_covariance, n)
        self._u, self._d = _factorise(self._p0)
        self._w = self._mean.copy()
        self._num_learned = 0
        self._rows = _prior_rows(self._u, self._d, self._mean, forgetting) if forgetting < 1.0 else []

    @property
    def weights(self) -> tuple[float, ...]:
        """The current w, shape (n,)."""
        return tuple(self._w)

    def predict(self, x: Sequence[float]) -> float:
        """Return w.x for features of shape (n,).

        Raises:
            ValueError: `x` has the wrong length, or the prediction is not finite.
        """
        if len(x) != self._n:
            raise ValueError("x has the wrong length")
        y = plain_sum(map(mul, self._w, x))
        if not isfinite(y):
            raise ValueError("the prediction is not finite")
        return y

    def learn(self, x: Sequence[float], y: float) -> None:
        """Update the weights with one observation. O(n^2) time.

        Args:
            x: Features, shape (n,), of the same scale as at `predict`.
            y: What was observed.

        Raises:
            ValueError: `x` has the wrong length, a value is not finite, or the update would overflow. The
                state is unchanged.

        Source: Ljung & Soderstrom ch. 6; the weights follow Haykin, 4th ed., table 9.1.
        """
        if len(x) != self._n:
            raise ValueError("x has the wrong length")
        u, d, w = self._u.copy(), self._d.copy(), self._w.copy()
        _absorb(u, d, w, [float(v) for v in x], float(y), self._forgetting)
        if self._rows:
            row, target = self._rows[self._num_learned % self._n]
            _absorb(u, d, w, row, target, 1.0)
        if not isfinite(plain_sum(u) + plain_sum(d) + plain_sum(w)):
            raise ValueError("an observation is not finite, or too large to learn from")
        self._u, self._d, self._w = u, d, w
        self._num_learned += 1

    def covariance(self) -> list[list[float]]:
        """Return P, shape (n, n), exactly symmetric, in units of the observation noise's variance."""
        n, d = self._n, self._d
        columns = [[*_column(self._u, j), 1.0] for j in range(n)]
        p = [[0.0] * n for _ in range(n)]
        for i in range(n):
            for j in range(i, n):
                p[i][j] = p[j][i] = plain_sum(columns[m][i] * d[m] * columns[m][j] for m in range(j, n))
        return p

    def nonnegative_weights(self) -> tuple[float, ...]:
        """Return the most likely weights among those with none negative, shape (n,).

        The most negative weight is fixed at 0 and the others take their expectation given that, by P, until
        none is negative: at most n rounds. Greedy: a weight once fixed stays fixed, so the answer may be
        slightly off the exact non-negative least squares. Learning is not affected.

        Source: conditional mean of a Gaussian; Goodwin & Sin, Adaptive Filtering Prediction and Control,
        ch. 3 (estimates under constraints, projected in the metric of P).
        """
        w = self._w
        if min(w) >= 0.0:
            return tuple(w)
        p = self.covariance()
        while min(w) < 0.0:
            k = w.index(min(w))
            row, pkk = p[k], p[k][k]
            gain = [v / pkk for v in row] if pkk > 0.0 else [0.0] * self._n
            wk = w[k]
            w = [wi - gi * wk for wi, gi in zip(w, gain, strict=True)]
            p = [
                [pij - gi * v for pij, v in zip(pi, row, strict=True)] for pi, gi in zip(p, gain, strict=True)
            ]
            for i in range(self._n):
                p[i][k] = p[k][i] = 0.0
            w[k] = 0.0
        return tuple(w)


def _absorb(
    u: list[float], d: list[float], w: list[float], x: list[float], y: float, forgetting: float
) -> None:
    """Fold one observation of noise variance 1 into U, D and w, in place.

    `u` holds the strict upper triangle by columns: column j starts at j*(j-1)/2. Values that are not finite
    stay visible as such in the results, or raise here.

    Raises:
        ValueError: x'Px is not finite.
    """
    residual = y - plain_sum(map(mul, w, x))
    gain: list[float] = []
    alpha = forgetting
    start = 0
    for j, f in enumerate(x):
        for i in range(j):
            f += u[start + i] * x[i]
        v = d[j] * f
        before = alpha
        alpha += f * v
        d[j] *= before / (alpha * forgetting)
        slope = -f / before
        for i in range(j):
            old = u[start + i]
            u[start + i] = old + gain[i] * slope
            gain[i] += old * v
        gain.append(v)
        start += j
    if not isfinite(alpha):
        raise ValueError("an observation is not finite, or too large to learn from")
    step = residual / alpha
    for i, g in enumerate(gain):
        w[i] += g * step


def _prior_rows(
    u: list[float], d: list[float], mean: list[float], forgetting: float
) -> list[tuple[list[float], float]]:
    """Return the prior as n observations (row, target), one of which is learned after each real one.

    P0^-1 = G' D^-1 G with G = U^-1, so row k is G's row k over the root of d[k]. Each comes round every n
    steps and is scaled to carry n * (1 - forgetting) of its information, which is at least what forgetting
    took of it meanwhile (1 - forgetting**n <= n * (1 - forgetting)): hence rule 2.
    """
    n = len(d)
    columns = [_column(u, j) for j in range(n)]
    rows = []
    for k in range(n):
        row = [0.0] * n
        row[k] = 1.0
        for j in range(k + 1, n):
            row[j] = -plain_sum(row[m] * columns[j][m] for m in range(k, j))
        scale = sqrt(n * (1.0 - forgetting) / d[k])
        row = [v * scale for v in row]
        rows.append((row, plain_sum(map(mul, row, mean))))
    return rows


def _factorise(p: list[list[float]]) -> tuple[list[float], list[float]]:
    """Return (u, d) of a symmetric positive definite matrix (Bierman, ch. III)."""
    n = len(p)
    a = [row.copy() for row in p]
    u = [0.0] * (n * (n - 1) // 2)
    d = [0.0] * n
    for j in reversed(range(n)):
        d[j] = a[j][j]
        if not d[j] > 0.0:
            raise ValueError("prior_covariance must be positive definite")
        start = j * (j - 1) // 2
        for i in range(j):
            u[start + i] = a[i][j] / d[j]
        for i in range(j):
            for k in range(i + 1):
                a[k][i] -= u[start + i] * d[j] * u[start + k]
    return u, d


def _column(u: list[float], j: int) -> list[float]:
    """Return column j of U above the diagonal, shape (j,)."""
    start = j * (j - 1) // 2
    return u[start : start + j]


def _square(value: float | Sequence[Sequence[float]], n: int) -> list[list[float]]:
    """Return `value` as an (n, n) matrix, checked to be finite and symmetric."""
    if isinstance(value, (int, float)):
        return [[float(value) if i == j else 0.0 for j in range(n)] for i in range(n)]
    if len(value) != n:
        raise ValueError("prior_covariance must have shape (n, n)")
    p = [_finite_vector("prior_covariance", row, n) for row in value]
    if any(p[i][j] != p[j][i] for i in range(n) for j in range(i)):
        raise ValueError("prior_covariance must be symmetric")
    return p


def _finite_vector(name: str, values: Sequence[float], n: int) -> list[float]:
    """Return `values` as n finite floats."""
    vector = [float(v) for v in values]
    if len(vector) != n or not all(map(isfinite, vector)):
        raise ValueError(f"{name} must hold {n} finite numbers")
    return vector
