"""The weights of a run that has not ended, out of its snapshots."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from hamdist.models.build import ModelFactory
from hamdist.runtime.snapshots.resume import earlier
from hamdist.runtime.storage.snapshot_files import latest
from hamdist.runtime.train.train import snapshot_model
from hamdist.streams.factory import make_stream
from hamdist.study.run.run import build, torch_dtype


def exported(
    where: str, factory: ModelFactory | None, told: Callable[[str], None]
) -> tuple[dict[str, Tensor], str]:
    """Return the `state_dict` at the latest snapshot of a folder (or at one snapshot), and its
    name.

    `factory` makes the model, if the run had one of the user's. Raises SnapshotError.
    """
    snapshot = latest(where, told)
    settings = earlier(snapshot)
    dtype = torch_dtype(settings.dtype)
    stream = make_stream(settings.stream, seed=settings.seed, dtype=dtype)
    model = build(settings, stream.spec, factory, dtype)
    learned = snapshot_model(snapshot, model, stream.spec, settings)
    state = {k: v.detach().clone().contiguous() for k, v in learned.state_dict().items()}
    return state, str(snapshot)
