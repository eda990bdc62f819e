"""Estimators of scikit-learn and of river around a live run."""

from __future__ import annotations

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from hamdist.adapters.scikit_learn import Classifier

DOES_NOT_APPLY: dict[str, str] = {}


@parametrize_with_checks([Classifier(epochs=20)], expected_failed_checks=lambda _: DOES_NOT_APPLY)
def test_the_checks_of_scikit_learn(estimator, check):
    check(estimator)


@pytest.mark.slow
def test_the_checks_of_river():
    pytest.importorskip("river")
    from river import checks

    from hamdist.adapters.river import RiverClassifier

    model = RiverClassifier(level="backprop")
    for check in checks.yield_checks(model):
        check(model.clone())
