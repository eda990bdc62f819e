"""The drifting stream: statistics against the parameters that it was given."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from hamdist.errors import SettingsError
from hamdist.streams import DriftStream, Sample


def stream(**changes: int | float | torch.dtype) -> DriftStream:
    options = {"features": 5, "classes": 3, "period": 4, "noise": 0.5, "batch": 200, "seed": 0}
    return DriftStream(**{**options, **changes})


def take(source: DriftStream, items: int) -> list[Sample]:
    return list(islice(source.samples(), items))


def targets(sample: Sample) -> torch.Tensor:
    assert sample.y is not None
    return sample.y


def test_centres_jump_at_the_labelled_items_and_nowhere_else() -> None:
    source = stream(noise=0.0, batch=60)
    means = []
    for sample in take(source, 13):
        y = targets(sample)
        means.append(torch.stack([sample.u[y == label].mean(0) for label in range(3)]))
    jumps = tuple(n for n in range(1, 13) if (means[n] - means[n - 1]).abs().max() > 1e-3)
    assert jumps == (4, 8, 12) == source.drifts(13)
    assert source.drifts(12) == (4, 8)
    assert source.drifts(4) == ()
    assert [source.concept(n) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_items_are_gaussian_around_the_centres_in_force() -> None:
    source = stream(period=2, batch=3000)
    for n, sample in enumerate(take(source, 4)):
        y = targets(sample)
        residual = sample.u.double() - source.centres(n // 2)[y]
        # 15000 values: standard errors .5/sqrt(15000) = .004 and .003; classes 1000 +- 26
        assert residual.mean().item() == pytest.approx(0.0, abs=0.02)
        assert residual.std().item() == pytest.approx(0.5, abs=0.015)
        assert (torch.bincount(y, minlength=3) - 1000).abs().max() < 130


def test_centres_are_standard_normal() -> None:
    centres = torch.stack([stream(features=50).centres(k) for k in range(200)])
    assert centres.mean().item() == pytest.approx(0.0, abs=0.03)
    assert centres.std().item() == pytest.approx(1.0, abs=0.03)


def test_held_out_belongs_to_the_concept_and_is_not_in_the_stream() -> None:
    source = stream(dtype=torch.float64)
    for item, concept in ((0, 0), (3, 0), (4, 1), (9, 2)):
        x, y = source.held_out(item)
        residual = x - source.centres(concept)[y]
        assert x.shape == (1024, 5)
        assert residual.std().item() == pytest.approx(0.5, abs=0.03)
    x, _ = source.held_out(0, rows=200)
    assert all(not torch.equal(sample.u, x) for sample in take(source, 4))
    assert torch.equal(x, source.held_out(3, rows=200)[0])


def test_seeds() -> None:
    one, same, other = (take(stream(seed=seed), 6) for seed in (0, 0, 1))
    for a, b, c in zip(one, same, other, strict=True):
        assert torch.equal(a.u, b.u)
        assert torch.equal(targets(a), targets(b))
        assert not torch.equal(a.u, c.u)


def test_both_dtypes_see_the_same_stream() -> None:
    double = take(stream(dtype=torch.float64), 6)
    for a, b in zip(take(stream(), 6), double, strict=True):
        assert torch.equal(a.u, b.u.float())
        assert torch.equal(targets(a), targets(b))


def test_spec() -> None:
    source = stream()
    spec, sample = source.spec, take(source, 1)[0]
    assert (
        (spec.u_shape, spec.u_dtype)
        == ((200, 5), torch.float32)
        == (
            tuple(sample.u.shape),
            sample.u.dtype,
        )
    )
    assert (spec.y_shape, spec.y_dtype, spec.classes) == ((200,), torch.int64, 3)
    assert source.portable


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("features", 0),
        ("classes", 1),
        ("period", 0),
        ("batch", 0),
        ("noise", -0.1),
        ("noise", float("nan")),
        ("noise", float("inf")),
    ],
)
def test_arguments(field: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"{field} is {value}"):
        stream(**{field: value})


def test_held_out_arguments() -> None:
    with pytest.raises(SettingsError, match="sample -1"):
        stream().held_out(-1)
    with pytest.raises(SettingsError, match="0 of them"):
        stream().held_out(0, rows=0)
