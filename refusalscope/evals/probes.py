"""Linear probes: logistic regression (scikit-learn's) and the mass-mean probe, regularised by grouped cross-validation.

Whatever is standardised or scaled while fitting is folded into the weights, so a fitted probe is one vector and one
number on activations as they are read. Knows nothing of what the columns are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2)
"""Inverse regularisation C that is tried."""
DENSE_STRENGTHS = STRENGTHS[:4]
"""The same for the whole residual stream, whose many columns want a strong penalty."""
SPARSE_STRENGTHS = (1e-2, 1e-1, 1.0)
"""The same for L1 over every feature of a layer: beyond these hardly a weight is pushed to zero."""
FOLDS = 5
ITERATIONS = 10_000
TOLERANCE = 1e-6
Fold = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Which prompts are fitted on, and which are scored."""
Fit = Callable[[float, Any, Int[ndarray, "prompt"]], Any]
"""(C, standardised inputs, labels) -> a fitted classifier."""


class Probe(NamedTuple):
    """A linear score in logits: `inputs @ weights + bias`."""

    weights: Float[ndarray, "k"]
    bias: float
    strength: float | None = None
    """The C that cross-validation chose; None where nothing was chosen."""

    def score(self, inputs: "Float[ndarray, 'prompt k'] | csr_matrix") -> Float[ndarray, "prompt"]:
        return np.asarray(inputs @ self.weights).ravel() + self.bias


class Unfit(ValueError):
    """Labels of one class alone: there is nothing to learn."""


def logistic(
    inputs: Float[ndarray, "prompt k"],
    labels: Sequence[int],
    folds: Sequence[Fold],
    *,
    strengths: Sequence[float] = STRENGTHS,
) -> Probe:
    """L2 logistic regression on standardised inputs; C is that of least mean log loss over `folds` of whole groups.

    Raises Unfit where one class is missing.
    """
    from sklearn.linear_model import LogisticRegression

    y = _labels(labels)
    centre, spread = inputs.mean(0), _spread(inputs.std(0))
    standard = (inputs - centre) / spread

    def fit(strength: float, x: Any, targets: Int[ndarray, "prompt"]) -> Any:
        return LogisticRegression(C=strength, max_iter=ITERATIONS, tol=TOLERANCE).fit(x, targets)

    strength = _chosen(fit, strengths, standard, y, folds)
    made = fit(strength, standard, y)
    weights = made.coef_[0] / spread
    return Probe(weights, float(made.intercept_[0] - weights @ centre), strength)


def sparse(inputs: csr_matrix, labels: Sequence[int], folds: Sequence[Fold], *, seed: int = 0) -> Probe:
    """L1 logistic regression on inputs divided by their deviation, not centred, so that zeros stay zeros.

    Raises Unfit where one class is missing.
    """
    from sklearn.linear_model import LogisticRegression

    y = _labels(labels)
    mean = np.asarray(inputs.mean(0)).ravel()
    squares = np.asarray(inputs.multiply(inputs).mean(0)).ravel()
    spread = _spread(np.sqrt(np.maximum(squares - mean**2, 0)))
    scaled = csr_matrix(inputs.multiply(1 / spread))

    def fit(strength: float, x: Any, targets: Int[ndarray, "prompt"]) -> Any:
        # liblinear draws the order of its coordinates, and penalises the intercept unless that is scaled up.
        made = LogisticRegression(
            C=strength, l1_ratio=1.0, solver="liblinear", intercept_scaling=100, random_state=seed, max_iter=1000
        )
        return made.fit(x, targets)

    strength = _chosen(fit, SPARSE_STRENGTHS, scaled, y, folds)
    made = fit(strength, scaled, y)
    return Probe(made.coef_[0] / spread, float(made.intercept_[0]), strength)


def mass_mean(inputs: Float[ndarray, "prompt k"], labels: Sequence[int]) -> Probe:
    """The difference of the class means (Marks and Tegmark 2023), its projection made logits by logistic regression.

    Raises Unfit where one class is missing.
    """
    from sklearn.linear_model import LogisticRegression

    y = _labels(labels)
    direction = inputs[y == 1].mean(0) - inputs[y == 0].mean(0)
    along = inputs @ direction
    centre, spread = float(along.mean()), float(_spread(along.std()[None])[0])
    made = LogisticRegression(C=1.0, max_iter=ITERATIONS, tol=TOLERANCE).fit(((along - centre) / spread)[:, None], y)
    slope = float(made.coef_[0, 0]) / spread
    return Probe(direction * slope, float(made.intercept_[0]) - slope * centre)


def _labels(labels: Sequence[int]) -> NDArray[np.int64]:
    y = np.asarray(labels, dtype=np.int64)
    if len(set(y.tolist())) < 2:
        raise Unfit("the training prompts are all of one class")
    return y


def _spread(deviation: Float[ndarray, "k"]) -> Float[ndarray, "k"]:
    """Standard deviations; 1 where a column hardly varies."""
    return np.where(deviation > 1e-12, deviation, 1.0)


def _chosen(
    fit: Fit, strengths: Sequence[float], inputs: Any, y: Int[ndarray, "prompt"], folds: Sequence[Fold]
) -> float:
    """The strength of least log loss on prompts that were not fitted on; ties go to the strongest penalty."""
    if not folds:
        return 1.0
    losses = dict.fromkeys(strengths, 0.0)
    for inside, outside in folds:
        for strength in strengths:
            logits = fit(strength, inputs[inside], y[inside]).decision_function(inputs[outside])
            losses[strength] += float((np.logaddexp(0, logits) - y[outside] * logits).sum())
    return min(strengths, key=lambda strength: (losses[strength], strength))


def grouped_folds(labels: Sequence[int], groups: Sequence[str], *, seed: int = 0) -> list[Fold]:
    """Folds in which no group is torn apart and the classes are as even as can be, each with both classes to fit on.

    Fewer than `FOLDS` where a class has fewer groups, none where it has one alone.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    y = np.asarray(labels, dtype=np.int64)
    _, names = np.unique(np.asarray(groups), return_inverse=True)
    count = min(FOLDS, *(len(set(names[y == value].tolist())) for value in (0, 1)))
    if count < 2:
        return []
    made = StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(y, y, names)
    return [(inside, outside) for inside, outside in made if len(set(y[inside].tolist())) == 2]
