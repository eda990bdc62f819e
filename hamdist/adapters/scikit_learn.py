"""Live runs as a classifier and a regressor of scikit-learn's.

learner = Classifier(level="trace").partial_fit(X, y, classes=[0, 1, 2])
learner.predict_proba(X)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from hamdist.api import start
from hamdist.dynamics.user_modules.generator import generator_kept
from hamdist.runtime.live.run import LiveRun

MakesNetwork = Callable[[int, int], nn.Module]


def small_network(features: int, classes: int) -> nn.Module:
    """Return a network of 32 tanh units, (B, features) -> (B, classes)."""
    return nn.Sequential(nn.Linear(features, 32), nn.Tanh(), nn.Linear(32, classes))


class Learner:
    """A network that learns in a live run, begun when it is needed; copies begin their own, with
    its weights (momentum and the like begin anew). classes: None for real targets."""

    def __init__(self, network: nn.Module, classes: int | None, level: str, settings: Any) -> None:
        self.model, self._classes, self._level = network.float(), classes, level  # (as inputs are)
        self._settings = {} if classes is not None else {"loss": "mse"}
        self._settings |= settings or {}
        self._run: LiveRun | None = None
        self._learned = False

    def learn(self, u: Tensor, y: Tensor) -> None:
        """Learn from u (B, features) with classes y (B,), or real values (B, outputs)."""
        if self._run is None:
            example: dict[str, Any] = {"example": (u, y), "classes": self._classes, "idle": None}
            self._run = start(self.model, level=self._level, **{**example, **self._settings})
        self._run.feed(u, y)
        self._learned = True

    def outputs(self, u: Tensor) -> Tensor:
        """Return (B, outputs) of float64, behind all that was learned."""
        if self._run is not None and self._learned:
            self._run.settle()
            self.model, self._learned = self._run.model().eval(), False
        with torch.no_grad():
            y: Tensor = self.model(u)
        return y.double()

    def probabilities(self, u: Tensor) -> Tensor:
        """Return (B, classes)."""
        return torch.softmax(self.outputs(u), 1)

    def __getstate__(self) -> dict[str, Any]:
        self.outputs(next(self.model.parameters())[:1].detach())  # (any row will do)
        return {**self.__dict__, "_run": None}

    def __del__(self) -> None:
        if self.__dict__.get("_run") is not None and self._run is not None:
            self._run._end()


class _Estimator(BaseEstimator):  # type: ignore[misc]
    """Base of both estimators: arguments, and learning row by row."""

    def __init__(
        self,
        network: MakesNetwork = small_network,
        level: str = "trace",
        settings: Any = None,
        batch: int = 8,
        epochs: int = 40,
        random_state: Any = 0,
    ) -> None:
        self.network, self.level, self.settings = network, level, settings
        self.batch, self.epochs, self.random_state = batch, epochs, random_state

    def _begin(self, features: int, outputs: int, classes: int | None) -> None:
        random = check_random_state(self.random_state)
        with generator_kept(random.randint(2**31)):
            network = self.network(features, outputs)
        self.learner_ = Learner(network, classes, self.level, self.settings)
        self.order_ = random

    def _learn(self, u: Tensor, y: Tensor, epochs: int) -> None:
        for _ in range(epochs):
            rows = self.order_.permutation(len(u)) if epochs > 1 else np.arange(len(u))
            for first in range(0, len(u), self.batch):
                some = torch.from_numpy(rows[first : first + self.batch])
                self.learner_.learn(u[some], y[some])

    def _inputs(self, X: Any) -> Tensor:
        check_is_fitted(self)
        return torch.from_numpy(validate_data(self, X, reset=False, dtype=np.float32))


class Classifier(ClassifierMixin, _Estimator):  # type: ignore[misc]
    """A network that learns locally. It has to be a chain whose first weight is (units, features).

    Args:
        network: makes the module of the numbers of features and classes.
        level: of locality; settings: other arguments of `hamdist.start`.
        batch: rows of a sample; epochs: passes of `fit` (`partial_fit` makes one).
        random_state: of the weights and of the order.
    """

    def fit(self, X: Any, y: Any) -> Classifier:
        """Learn anew from X (N, features) and y (N,)."""
        self.__dict__.pop("learner_", None)
        return self._take(X, y, None, self.epochs)

    def partial_fit(self, X: Any, y: Any, classes: Sequence[Any] | None = None) -> Classifier:
        """Learn on. classes: all that will come, at the first call."""
        return self._take(X, y, classes, 1)

    def _take(self, X: Any, y: Any, classes: Any, epochs: int) -> Classifier:
        new = "learner_" not in self.__dict__
        X, y = validate_data(self, X, y, reset=new, dtype=np.float32)
        check_classification_targets(y)
        if new:
            self.classes_ = np.unique(y if classes is None else classes)
            self._begin(X.shape[1], len(self.classes_), len(self.classes_))
        places = np.searchsorted(self.classes_, y).clip(max=len(self.classes_) - 1)
        if (self.classes_[places] != y).any():
            raise ValueError("y has a class that is not in classes")
        self._learn(torch.from_numpy(X), torch.from_numpy(places), epochs)
        return self

    def predict_proba(self, X: Any) -> Any:
        """Return (N, classes)."""
        u = self._inputs(X)
        return self.learner_.probabilities(u).numpy()

    def predict(self, X: Any) -> Any:
        """Return the classes, (N,)."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]


class Regressor(RegressorMixin, _Estimator):  # type: ignore[misc]
    """A network that learns real values locally, of one column or several; as `Classifier`.

    Inputs and targets should have a mean near 0 and a spread near 1 (`StandardScaler`,
    `TransformedTargetRegressor`).
    """

    def fit(self, X: Any, y: Any) -> Regressor:
        """Learn anew from X (N, features) and y (N,) or (N, outputs)."""
        self.__dict__.pop("learner_", None)
        return self._take(X, y, self.epochs)

    def partial_fit(self, X: Any, y: Any) -> Regressor:
        """Learn on."""
        return self._take(X, y, 1)

    def _take(self, X: Any, y: Any, epochs: int) -> Regressor:
        new = "learner_" not in self.__dict__
        how: Any = {"dtype": np.float32, "multi_output": True, "y_numeric": True}
        X, y = validate_data(self, X, y, reset=new, **how)
        columns = np.ascontiguousarray(y.reshape(len(y), -1), np.float32)
        if new:
            self.flat_ = y.ndim == 1
            self._begin(X.shape[1], columns.shape[1], None)
        self._learn(torch.from_numpy(X), torch.from_numpy(columns), epochs)
        return self

    def predict(self, X: Any) -> Any:
        """Return the values, (N,) or (N, outputs)."""
        u = self._inputs(X)
        values = self.learner_.outputs(u).numpy()
        return values[:, 0] if self.flat_ else values
