"""Jobs as tasks of a Ray cluster: of the one that is up, else of this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import Any, TypeVar

from moesaic.errors import MissingDependency, first_line

Job = TypeVar("Job")
Found = TypeVar("Found")

AGAIN = 2
"""How often a job is given to another worker, when the one that had it has died."""


def on_ray(
    work: Callable[[Job], Found], jobs: Iterable[Job], *, cpus: Callable[[Job], int] = lambda job: 1, gpus: float = 0
) -> closing[Generator[tuple[Job, Found | str]]]:
    """Jobs with what `work` found of each, or why it found nothing, as they end; to be closed.

    The machines share the folders that jobs name; those may be relative to this process's.

    Args:
        cpus: that a job takes of its machine. gpus: likewise.
    Raises:
        MissingDependency: the `ray` extra is not installed.
    """
    try:
        import ray
    except ImportError:
        raise MissingDependency("ray", "ray") from None
    return closing(_ended(ray, work, list(jobs), cpus, gpus))


def _ended(ray: Any, work: Callable[[Any], Any], jobs: list[Any], cpus: Callable[[Any], int], gpus: float) -> Any:
    here = os.getcwd()

    def work_here(job: Any) -> Any:
        os.chdir(here)
        return work(job)

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    running = {
        ray.remote(num_cpus=cpus(job), num_gpus=gpus, max_retries=AGAIN)(work_here).remote(job): job for job in jobs
    }
    try:
        while running:
            (done,), _ = ray.wait([*running])
            try:
                found = ray.get(done)
            except ray.exceptions.RayError as error:
                found = f"its task ended: {first_line(error)}"
            yield running.pop(done), found
    finally:
        for task in running:
            ray.cancel(task)
        if running:  # those that run may have something to keep
            ray.wait([*running], num_returns=len(running))
