"""What a live run answers: predictions, and where it stands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from hamdist.runtime.nodes.emissions import Answered
from hamdist.runtime.plan.plan import Plan
from hamdist.runtime.results.result import Progress

ADDRESS = "address.json"  # in a served run's folder
SAFETENSORS = "application/x-safetensors"


@dataclass(frozen=True, slots=True)
class Answer:
    """The prediction of sample `number`: (B, ...), or a dict of them by readout."""

    number: int
    prediction: Tensor | dict[str, Tensor]
    _versions: Callable[[], dict[str, int]] = field(repr=False)

    @property
    def versions(self) -> dict[str, int]:
        """Return the updates that each block's weights had had when the sample passed it (with
        presentation 'hold': when its prediction was made), as the stamps of signals count them."""
        return self._versions()


def versions_of(plan: Plan, news: Answered) -> dict[str, int]:
    """Return `Answer.versions`."""
    edges = [edge for edge in plan.graph.edges if not edge.from_input]
    sent = {edge.parent: plan.schedule.state(edge, news.event) for edge in edges}
    others = {name: stamp.version for name, stamp in sent.items() if stamp is not None}
    return {**others, news.readout: news.version}


@dataclass(frozen=True, slots=True)
class LiveStatus:
    """Samples that were `fed`, and `answered`; what is `waiting` for the network; the engine's
    latest report, of one to four a second."""

    fed: int
    answered: int
    waiting: int
    paused: bool
    progress: Progress | None
