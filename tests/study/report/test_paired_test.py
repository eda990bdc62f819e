"""The paired test against scipy.stats and tables of the t distribution."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from hamdist.display.table import Table, latex
from hamdist.study.report.paired_test import in_words, paired_test
from hamdist.study.report.table import interval

DIFFERENCES = [
    [-0.012, 0.004, -0.007],
    [0.3, 0.31, 0.29, 0.33, 0.28],
    [1.0, -1.0, 2.0, 0.5],
    [-0.01, -0.02],
]


@pytest.mark.parametrize("differences", DIFFERENCES)
def test_interval_and_p(differences):
    found = paired_test(differences)
    expected = stats.ttest_1samp(differences, 0.0)
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


@pytest.mark.parametrize(("effect", "seeds"), [(0.2, 199), (0.5, 34), (0.8, 15), (1.0, 10)])
def test_seeds_to_tell(effect, seeds):
    """Cohen's table for one sample, 5 %, power 0.8; and one fewer has less power."""
    found = paired_test([effect - 1 / math.sqrt(2), effect + 1 / math.sqrt(2)])
    assert found.seeds_to_tell == seeds


def test_a_level_is_tested_at_five_per_cent():
    """Of samples without a difference one in twenty is told apart, within three deviations."""
    draws = stats.norm.rvs(size=(500, 4), random_state=3)
    found = sum(paired_test(list(row)).p < 0.05 for row in draws)
    assert abs(found - 25) < 3 * math.sqrt(500 * 0.05 * 0.95)


def test_what_has_no_test():
    assert paired_test([0.1]) is None
    assert paired_test([0.1, math.nan]) is None
    same = paired_test([0.0, 0.0, 0.0])
    assert (same.p, same.seeds_to_tell) == (1.0, None)
    assert in_words(same, 3) == "equal to the baseline with all 3 seeds"


def test_words():
    told = paired_test([0.3, 0.31, 0.29, 0.33, 0.28])
    assert in_words(told, 5) == "differs from the baseline (paired t test over 5 seeds, p < 0.001)"
    unsure = paired_test([-0.012, 0.004, -0.007])
    assert f"about {unsure.seeds_to_tell} seeds" in in_words(unsure, 3)
    assert interval(unsure, 100.0) == "-2.53 to +1.53"


def test_latex():
    table = Table(
        ["level", "gap, %"],
        [["trace_1", "-0.1 ± 0.2"], ["a & b", "–"], ["|x|", "< 0.1"]],
        ["a\nnote"],
    )
    assert latex(table).splitlines() == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"level & gap, \% \\",
        r"\midrule",
        r"trace\_1 & -0.1 $\pm$ 0.2 \\",
        r"a \& b & -- \\",
        r"$|$x$|$ & $<$ 0.1 \\",
        r"\bottomrule",
        r"\end{tabular}",
        "% a",
        "% note",
    ]
