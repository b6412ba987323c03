"""Effective dimensionality of activations: (sum l)^2 / sum l^2 over the eigenvalues l of a covariance C.

The sum of eigenvalues is the trace of C and that of their squares the trace of C^2, the sum of its squared
elements: so nothing is decomposed.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from topogpt import topo
from topogpt.analysis.activations import check_finite
from topogpt.analysis.covariance import Covariance
from topogpt.analysis.reading import read
from topogpt.analysis.subject import Subject
from topogpt.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Dimensionality(NamedTuple):
    n_units: int
    value: float
    shuffled: float  # of units that are independent, of the same variances and as many tokens


def dimensionality(covariance: Covariance) -> Dimensionality:
    n, scatter = covariance.n_tokens, covariance.scatter
    variance = scatter.diagonal().numpy() / (n - 1)
    squares = float((scatter * scatter).sum()) / (n - 1) ** 2
    return Dimensionality(len(variance), ratio(variance.sum(), squares), shuffled(variance, n))


def ratio(trace: float, squares: float) -> float:
    """(sum l)^2 / sum l^2; units that never change have no dimensions to count."""
    return float(trace**2 / squares) if squares > 0 else float("nan")


def shuffled(variance: np.ndarray, n_tokens: int) -> float:
    """The value to expect with every unit shuffled over the tokens by itself.

    A shuffle keeps each variance v, and the squared covariance of two shuffled units is v_i v_j / (N - 1) in
    the mean over shuffles, whatever the distribution: so the mean of trace(C^2) is known exactly, nothing is
    shuffled, and no activation is kept. For equal variances it is about n / (1 + n / N).
    """
    v, v2 = variance.sum(), (variance**2).sum()
    return ratio(v, v2 + (v**2 - v2) / (n_tokens - 1))


def measure(
    subject: Subject, windows: np.ndarray, patterns: Sequence[str], skip: int
) -> dict[str, Dimensionality]:
    """Of every named sheet and module, in one pass over windows (n, length), without their first tokens."""
    found = {name: Covariance() for name in chosen(patterns, subject)}

    def take(name: str, start: int, x: "Tensor") -> None:
        found[name].add(x[:, skip:].flatten(0, 1))

    read(subject, windows, found, take)
    for name, covariance in found.items():
        if not covariance.n_tokens:
            raise UserError(f"names: {name} is never called as a layer, so it has no activations")
        check_finite({name: covariance.products.sum().numpy()})
    return {name: dimensionality(covariance) for name, covariance in found.items()}


def chosen(patterns: Sequence[str], subject: Subject) -> list[str]:
    """Activations (of every layout) and modules that the patterns name, in the model's order."""
    n_layer, modules = subject.model.cfg.n_layer, [name for name, _ in subject.model.named_modules() if name]
    sheets = [name for layout in topo.LAYOUTS for name in topo.sheet_names(n_layer, layout)]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in sheets + modules):
            raise UserError(
                f"names = {pattern} is no sheet and no module of the model; there are "
                f"{', '.join(sheets[:2])} to {', '.join(sheets[-2:])}, and modules such as {modules[-3]}"
            )
    return [n for n in sheets + modules if any(fnmatchcase(n, p) for p in patterns)]
