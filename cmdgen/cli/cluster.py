"""Jobs on a Ray cluster: actors that keep a model loaded make the forwards that one process would make."""

import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field, replace
from typing import Any

from cmdgen.cli.batch import Batch
from cmdgen.cli.errors import Failure
from cmdgen.cli.inputs import InputFiles
from cmdgen.cli.jobs import Batching, Job, Refused
from cmdgen.cli.progress import Say
from cmdgen.request import Request

# times that jobs are given to an actor again whose process died
_RETRIES = 2


@dataclass
class _Heard(Say):
    """Keeps what is said, for the process that prints it."""

    lines: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)

    def note(self, line: str) -> None:
        self.lines.append(("note", (line,)))

    def detail(self, line: str) -> None:
        self.lines.append(("detail", (line,)))

    def error(self, line: str) -> None:
        self.lines.append(("error", (line,)))

    def result(self, text: object, record: Any) -> None:
        self.lines.append(("result", (text, record)))


class Worker:
    """Makes jobs in a process of its own."""

    def __init__(self, request: Request, options: Batching, *, as_json: bool) -> None:
        import ray
        import torch

        from cmdgen.pipelines.load import load_pipeline

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        pipeline = load_pipeline(**request.loading)
        self.heard = _Heard(as_json=as_json)
        self.batch = Batch(pipeline, options, self.heard, InputFiles(request), alone=False, total=None)
        self.batch.show = lambda stage, done, total, figures="": None
        # the process before this one may have written some files of the jobs that come first
        self.again = ray.get_runtime_context().was_current_actor_reconstructed

    def make(self, jobs: list[Job]) -> tuple[list[tuple[str, tuple[Any, ...]]], int, int, Failure | None]:
        """Make jobs of one forward; return what was said, how many were made and failed, and what ends all."""
        self.heard.lines, self.batch.made, self.batch.failed = [], 0, 0
        jobs, self.again = [replace(job, unfinished=job.unfinished or self.again) for job in jobs], False
        failure = None
        try:
            self.batch.make(jobs)
        except Failure as error:
            failure = error
        return self.heard.lines, self.batch.made, self.batch.failed, failure


@dataclass
class Cluster(Batch):
    """One command's jobs, each forward on the next actor that is free."""

    request: Request = field(default_factory=Request)
    # actors, and by their answer those that work, with their jobs
    idle: deque[Any] = field(default_factory=deque)
    busy: dict[Any, tuple[Any, list[Job]]] = field(default_factory=dict)

    def make_all(self, jobs: Iterable[Job | Refused | None]) -> None:
        """Start Ray, or join it, and make the jobs; it ends with them, however they end."""
        try:
            import ray
        except ImportError as error:
            raise Failure("--ray needs the package ray: pip install ray") from error
        # nothing is sent to its makers
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        settings: dict[str, Any] = {"include_dashboard": False} if self.options.ray == "local" else {}
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=self.options.ray, log_to_driver=False, logging_level=logging.ERROR, **settings)
        # a node that does not start in time is a plain Exception of Ray's
        except Exception as error:
            raise Failure(f"Ray at {self.options.ray} does not answer: {error}") from error
        # Ray's own would end with another exit code
        signal.signal(signal.SIGTERM, handler)
        # Ray reports dead workers on stdout
        self.say.out = sys.stdout
        try:
            with redirect_stdout(sys.stderr):
                self.idle.extend(self._start(ray))
                super().make_all(jobs)
                while self.busy:
                    self._wait(ray)
        finally:
            ray.shutdown()

    def _start(self, ray: Any) -> list[Any]:
        """Start an actor for each GPU, or for each so many cores as it has threads."""
        resources, threads = ray.cluster_resources(), self.options.threads or 1
        gpus = 0 if self.request.device == "cpu" else int(resources.get("GPU", 0))
        count = gpus or max(1, int(resources.get("CPU", 1)) // threads)
        needs = {"num_gpus": 1} if gpus else {"num_cpus": min(threads, int(resources.get("CPU", 1)))}
        actor = ray.remote(max_restarts=-1, max_task_retries=_RETRIES, **needs)(Worker)
        self.note(f"Ray: {count} actors, {'a GPU' if gpus else f'{threads} threads'} each")
        options, as_json = replace(self.options, threads=None if gpus else threads), self.say.as_json
        return [actor.remote(self.request, options, as_json=as_json) for _ in range(min(count, self.total or count))]

    def make(self, jobs: list[Job]) -> None:
        """Hand jobs to an actor, once one is free."""
        import ray

        if not self.idle:
            self._wait(ray)
        worker = self.idle.popleft()
        self.busy[worker.make.remote(jobs)] = worker, jobs

    def _wait(self, ray: Any) -> None:
        """Wait for the jobs of one actor, and report them."""
        (done,), _ = ray.wait(list(self.busy), num_returns=1)
        worker, jobs = self.busy.pop(done)
        self.idle.append(worker)
        try:
            lines, made, failed, failure = ray.get(done)
        except ray.exceptions.RayActorError:
            error = Failure(f"the process that made it died {_RETRIES + 1} times")
            for job in jobs:
                self._refuse(Refused(job.index, job.line, error))
            return
        for kind, arguments in lines:
            # what several say is printed once
            getattr(self if kind in ("note", "detail") else self.say, kind)(*arguments)
        self.made, self.failed = self.made + made, self.failed + failed
        self._show_clips()
        if failure is not None:
            raise failure
