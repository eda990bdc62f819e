"""Independent calls as plain tasks of Ray, one processor each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from hamdist.config import EngineSettings
from hamdist.errors import ClusterError
from hamdist.runtime.ray_engine.session import ray_session

T = TypeVar("T")


def ray_tasks(
    engine: EngineSettings, function: Callable[[Any], T], arguments: Sequence[Any]
) -> Iterator[T]:
    """Yield function(argument) for each of `arguments`, in the order in which they finish.

    The tasks run on the Ray at `engine.address` (or a local one). Those left when the caller stops
    reading are cancelled. Raises the errors of `function`, and ClusterError for a lost task.
    """
    with ray_session(engine) as session:
        session.make_room()  # actors that wait for another run hold processors
        import ray
        from ray.exceptions import RayTaskError

        task = ray.remote(num_cpus=1)(function)
        waiting = [task.remote(argument) for argument in arguments]
        try:
            while waiting:
                (done,), waiting = ray.wait(waiting)
                try:
                    result: T = ray.get(done)
                except RayTaskError as error:
                    raise error.as_instanceof_cause() from None
                except ray.exceptions.RayError as error:
                    raise ClusterError(
                        f"a task of Ray was lost ({type(error).__name__}); what is finished is "
                        "kept: start the study again to go on with it"
                    ) from error
                yield result
        finally:
            for left in waiting:
                ray.cancel(left, force=True)
