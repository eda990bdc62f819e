"""Memory of the actors of a chain, against what its blocks have to hold.

    weights + costates + trace
    weights    theta
    costates   omega (as large as theta), h and z of the block's output, (B, O)
    trace      of each sample in flight at the block, 2 (D - l) + 1 of them, the inputs of its
               layers and its output

D: depth of the readout, l: of the block, B: batch, O: outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from hamdist.runtime.ray_engine.session import Session
from harness.ours import Configuration, Ours, fresh_actors
from harness.works import Work, mlp

RUN_SECONDS = 2.0
BYTES = {"float32": 4, "float64": 8}


@dataclass(frozen=True)
class Claim:
    """Bytes of one block. in_flight: samples whose activations it keeps at a time."""

    weights: int
    omega: int
    states: int
    trace: int
    in_flight: int

    @property
    def total(self) -> int:
        return self.weights + self.omega + self.states + self.trace

    @property
    def without_omega(self) -> int:
        """Plain gradient descent can do without it."""
        return self.total - self.omega

    @property
    def per_sample(self) -> int:
        return self.trace // self.in_flight


def claim(work: Work, share: tuple[int, int], depth: int, place: int) -> Claim:
    """Of the block with layers share[0] ... share[1] - 1, at depth `place` of 0 ... `depth`."""
    size = BYTES[work.dtype]
    sizes = list(zip(work.dims, work.dims[1:], strict=False))[slice(*share)]
    weights = size * sum(inputs * outputs + outputs for inputs, outputs in sizes)
    output = size * work.batch * sizes[-1][1]
    in_flight = 2 * (depth - place) + 1
    one = size * work.batch * sum(inputs for inputs, _ in sizes) + output
    return Claim(weights, weights, 2 * output, in_flight * one, in_flight)


@dataclass(frozen=True)
class Footprint:
    """Resident bytes of one actor at the end of a run (`RunResult.own_memory`: without the code of
    libraries and Ray's object store): growth over the same actor with a tiny network (`base`).
    peak: growth of the peak, with everything."""

    actor: str
    base: int
    growth: int
    peak: int
    claim: Claim

    @property
    def ratio(self) -> float:
        return self.growth / self.claim.total

    def sentence(self) -> str:
        c, mib = self.claim, 1 << 20
        return (
            f"{self.actor}: grew by {self.growth / mib:.1f} MiB over a base of "
            f"{self.base / mib:.0f} (its peak with library code and Ray's object store by "
            f"{self.peak / mib:.1f}); claim {c.total / mib:.1f} = weights {c.weights / mib:.1f} + "
            f"omega {c.omega / mib:.1f} + states {c.states / mib:.1f} + trace {c.trace / mib:.1f} "
            f"({c.in_flight} samples); against the claim without omega "
            f"{self.growth / c.without_omega:.2f}"
        )


def measure(session: Session, work: Work, configuration: Configuration) -> list[Footprint]:
    """One block per actor. The actors are new, and step a tiny network first."""
    fresh_actors(session)
    delay = configuration.delay
    tiny, side = Ours(mlp(8, 1), configuration), Ours(work, configuration)
    for each in (tiny, side):
        each.run(RUN_SECONDS)
    before, after = tiny.results[0], side.results[0]
    found = []
    groups = side.shares()
    depth = delay * (len(groups) - 1)
    for i, share in enumerate(groups):
        actor = f"actor {i}"
        base = before.own_memory[actor]
        growth = after.own_memory[actor] - base
        peak = after.peak_memory[actor] - before.peak_memory[actor]
        found.append(Footprint(actor, base, growth, peak, claim(work, share, depth, delay * i)))
    return found
