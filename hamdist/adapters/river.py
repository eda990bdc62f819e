"""A live run as a classifier of river's (`pip install 'hamdist[river]'`)."""

from __future__ import annotations

from typing import Any

import torch
from river import base

from hamdist.adapters.scikit_learn import Learner, MakesNetwork, small_network
from hamdist.dynamics.user_modules.generator import generator_kept


class RiverClassifier(base.Classifier):  # type: ignore[misc]
    """A network that learns locally, one row at a time.

    Args:
        features, classes: the most that may come; each gets a place when it comes first. A feature
            beyond them is left out, one that is missing is 0.
        network, level, settings, seed: as of `hamdist.adapters.scikit_learn.Classifier`.
    """

    def __init__(
        self,
        features: int = 64,
        classes: int = 16,
        network: MakesNetwork | None = None,
        level: str = "trace",
        settings: Any = None,
        seed: int = 0,
    ) -> None:
        self.features, self.classes, self.network = features, classes, network
        self.level, self.settings, self.seed = level, settings, seed
        self._places: dict[Any, int] = {}
        self._labels: list[Any] = []
        with generator_kept(seed):
            model = (network or small_network)(features, classes)
        self._learner = Learner(model, classes, level, settings)

    @property
    def _multiclass(self) -> bool:
        return True

    def _row(self, x: dict[Any, Any], *, new: bool) -> torch.Tensor:
        u = torch.zeros(1, self.features, dtype=torch.float32)
        for name, value in sorted(x.items(), key=lambda pair: str(pair[0])):
            if new and name not in self._places and len(self._places) < self.features:
                self._places[name] = len(self._places)
            if name in self._places:
                u[0, self._places[name]] = float(value)
        return u

    def learn_one(self, x: dict[Any, Any], y: Any) -> None:
        """Learn from a row. Raises ValueError for one class too many."""
        if y not in self._labels:
            if len(self._labels) == self.classes:
                raise ValueError(f"class {y!r} is one more than classes={self.classes}")
            self._labels.append(y)
        self._learner.learn(self._row(x, new=True), torch.tensor([self._labels.index(y)]))

    def predict_proba_one(self, x: dict[Any, Any]) -> dict[Any, float]:
        """Return the probabilities of the classes that have come."""
        p = self._learner.probabilities(self._row(x, new=False))[0, : len(self._labels)]
        return dict(zip(self._labels, (p / p.sum()).tolist(), strict=True))
