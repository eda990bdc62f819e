"""Estimators of scikit-learn and of river around a live run."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs, make_regression
from sklearn.preprocessing import StandardScaler

from hamdist.adapters.scikit_learn import Classifier, Regressor


def test_a_classifier_learns_and_is_copied_with_what_it_has_learned():
    x, y = make_blobs(60, centers=3, random_state=0)
    x = StandardScaler().fit_transform(x)
    learner = Classifier(level="backprop", epochs=10)
    assert learner.fit(x, y).score(x, y) > 0.8
    before = learner.predict_proba(x)
    copy = deepcopy(learner)
    np.testing.assert_array_equal(copy.predict_proba(x), before)
    learner.partial_fit(x, y)
    copy.partial_fit(x, y)
    np.testing.assert_array_equal(copy.predict_proba(x), learner.predict_proba(x))
    assert (before != learner.predict_proba(x)).any()


def test_a_regressor_learns_one_column_or_several():
    x, y = make_regression(80, 4, n_targets=2, random_state=0)
    x, y = StandardScaler().fit_transform(x), StandardScaler().fit_transform(y)
    both = Regressor(level="backprop", epochs=30).fit(x, y)
    assert both.predict(x).shape == (80, 2)
    assert both.score(x, y) > 0.8
    one = Regressor(level="backprop", epochs=30).fit(x, y[:, 0]).partial_fit(x, y[:, 0])
    assert one.predict(x).shape == (80,)
    assert one.score(x, y[:, 0]) > 0.8


UNSCALED = "the steps diverge on inputs of a spread of 100, and an error says so"
FAIL = {  # (docs/pages/how-to/live.md has this list, too)
    "check_supervised_y_2d": UNSCALED,
    "check_fit_idempotent": UNSCALED,
    "check_fit_check_is_fitted": UNSCALED,
    "check_n_features_in": UNSCALED,
}


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "fail"), [(Classifier, {}), (Regressor, FAIL)])
def test_the_checks_of_scikit_learn(estimator, fail):
    from sklearn.utils.estimator_checks import check_estimator  # (its import takes seconds)

    check_estimator(estimator(epochs=20), expected_failed_checks=fail, on_skip=None)


@pytest.mark.slow
def test_other_default_types():
    """Inputs are float32, whatever torch makes of weights."""
    X, y = make_blobs(40, random_state=0)
    torch.set_default_dtype(torch.float64)
    try:
        assert Classifier(level="backprop").fit(X, y).score(X, y) > 0.8
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_checks_of_river():
    pytest.importorskip("river")
    from river import checks

    from hamdist.adapters.river import RiverClassifier

    model = RiverClassifier(level="backprop")
    for check in checks.yield_checks(model):
        check(model.clone())
