"""`hamdist doctor`: facts of this host alone, or of all hosts of a cluster, and their verdicts."""

from __future__ import annotations

from collections.abc import Callable

from pydantic import ValidationError

from hamdist.errors import ClusterError
from hamdist.launch.doctor_report import DoctorCheck, Findings, host_facts, judged
from hamdist.launch.events import DoctorReport, Ended
from hamdist.launch.follow import Results, follow
from hamdist.launch.jobs_api import Jobs, missing_extras
from hamdist.launch.submit import submit_checkup
from hamdist.runtime.results.events import Warned


def checkup(jobs: Jobs | None, say: Callable[[str], None]) -> tuple[Findings, list[DoctorCheck]]:
    """Collect the findings of a cluster, or of this host alone (`jobs` None), and judge them.

    `say` is called with progress. Raises ClusterError if the cluster cannot be examined at all.
    """
    if jobs is None:
        return this_host()
    findings = _cluster(jobs, say)
    return findings, judged(findings, host_facts().versions)


def this_host() -> tuple[Findings, list[DoctorCheck]]:
    """Collect and judge the facts of this host alone."""
    findings = Findings(hosts=[host_facts()], clocks=[(0.0, 0.0)])
    missing = missing_extras()
    extras = DoctorCheck("ok", "Ray's Jobs API: its packages are here")
    if missing:
        text = f"no {', '.join(missing)}: hamdist launch needs pip install 'hamdist[cluster]'"
        extras = DoctorCheck("warning", text)
    return findings, [*judged(findings), extras]


def _cluster(jobs: Jobs, say: Callable[[str], None]) -> Findings:
    name = submit_checkup(jobs)
    lines: list[str] = []
    say(f"Looking at all hosts ({name})")
    for event in follow(jobs.lines(name), Results(None), lines.append):
        if isinstance(event, Warned):
            say(f"Warning: {event.text}")
        elif isinstance(event, DoctorReport):
            try:
                return Findings.model_validate_json(event.report)
            except ValidationError as error:
                raise ClusterError(
                    f"the cluster's hamdist reports in another way ({error.error_count()} fields "
                    "differ): install the same version there as here"
                ) from None
        elif isinstance(event, Ended) and event.error is not None:
            raise ClusterError(event.error)
    raise ClusterError("\n".join([*lines, jobs.find(name).unfinished()]))
