"""The state machine of a RunPod endpoint: jobs, workers, limits and faults. No I/O; the caller passes the time.

Limits, states, retention and field names follow RunPod's documentation of the job API (docs.runpod.io,
serverless/endpoints: operation-reference, send-requests, job-states, endpoint-configurations; read 2026-11).
Times are seconds of one monotonic clock; what goes over the wire (delayTime, executionTime, policy) is milliseconds.
"""

from __future__ import annotations

import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from local_runpod.faults import Fault, Faults, Refused

RUN_MAX_BYTES = 10_000_000
RUNSYNC_MAX_BYTES = 20_000_000
STREAM_CHUNK_MAX_BYTES = 1_000_000
RESULT_MAX_BYTES = 10_000_000
RUN_RETENTION = 30 * 60.0
RUNSYNC_RETENTION = 60.0
DEFAULT_TTL_MS = 86_400_000
DEFAULT_EXECUTION_TIMEOUT_MS = 600_000
POLICY_LIMITS_MS = {"ttl": (10_000, 604_800_000), "executionTimeout": (5_000, 604_800_000)}
MAX_DISPATCHES = 2  # a job whose worker vanishes is given to another one once
FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"})


@dataclass
class Job:
    """One job through its life."""

    id: str
    input: Any
    created: float
    ttl: float
    execution_timeout: float
    retention: float
    status: str = "IN_QUEUE"
    worker: str | None = None
    queued_at: float = 0.0
    started: float = 0.0
    finished: float = 0.0
    dispatches: int = 0
    output: Any = None
    error: str | None = None
    chunks: list[Any] = field(default_factory=list)
    # Set by the `crash` fault: what the worker answers to this dispatch is lost.
    doomed: bool = False

    def view(self, now: float) -> dict[str, Any]:
        """The job as /status shows it."""
        shown: dict[str, Any] = {"id": self.id, "status": self.status}
        if self.worker:
            shown["delayTime"] = round((self.started - self.queued_at) * 1000)
            shown["workerId"] = self.worker
        if self.dispatches > 1:
            shown["retries"] = self.dispatches - 1
        if self.status in FINAL and self.worker:
            shown["executionTime"] = round((self.finished - self.started) * 1000)
        if self.status == "COMPLETED" and self.output is not None:
            shown["output"] = self.output
        if self.error is not None:
            shown["error"] = self.error
        return shown


@dataclass
class Worker:
    """A worker as the platform sees it: by its polls and pings."""

    id: str
    seen: float
    lost: bool = False


class Platform:
    """One endpoint with its queue, jobs, workers and armed faults."""

    def __init__(self, endpoint: str, worker_timeout: float = 30.0, faults: Faults | None = None) -> None:
        self.endpoint = endpoint
        self.worker_timeout = worker_timeout
        self.execution_timeout_ms = DEFAULT_EXECUTION_TIMEOUT_MS
        self.images: dict[str, str] = {}  # of workers, where they are known
        self.asked: float | None = None  # when the last job came
        self.jobs: dict[str, Job] = {}
        self.queue: deque[str] = deque()
        self.workers: dict[str, Worker] = {}
        self.stops: dict[str, list[str]] = {}
        self.faults = Faults() if faults is None else faults
        self.counts = {"completed": 0, "failed": 0, "retried": 0}

    # --- the job API -------------------------------------------------------------------------------------------------

    def submit(self, body: Any, now: float, *, sync: bool = False) -> Job:
        """Queue the job of a /run or /runsync body. Raises Refused(400) for a body that RunPod would not take."""
        if not isinstance(body, dict) or "input" not in body:
            raise Refused(400, "the body must be an object with an `input`")
        policy = {} if body.get("policy") is None else body["policy"]
        if not isinstance(policy, dict):
            raise Refused(400, "policy must be an object")
        ttl, timeout = (
            self._policy_ms(policy, key, default)
            for key, default in (("ttl", DEFAULT_TTL_MS), ("executionTimeout", self.execution_timeout_ms))
        )
        job = Job(
            id=f"{'sync-' if sync else ''}{uuid.uuid4()}-e1",
            input=body["input"],
            created=now,
            queued_at=now,
            ttl=ttl / 1000,
            execution_timeout=timeout / 1000,
            retention=RUNSYNC_RETENTION if sync else RUN_RETENTION,
        )
        self.jobs[job.id] = job
        self.asked = now
        if not self.take_fault("stuck"):
            self.queue.append(job.id)
        return job

    def _policy_ms(self, policy: dict[str, Any], key: str, default: int) -> float:
        if key not in policy:
            return float(default)
        value = policy[key]
        low, high = POLICY_LIMITS_MS[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise Refused(400, f"policy.{key} must be between {low} and {high} milliseconds")
        return float(value)

    def status(self, job_id: str, now: float) -> dict[str, Any]:
        """The job's view. Raises Refused(404) for an unknown or expired one."""
        return self._job(job_id, now).view(now)

    def stream(self, job_id: str, now: float) -> dict[str, Any]:
        """The chunks since the last call, which are then gone."""
        job = self._job(job_id, now)
        chunks, job.chunks = job.chunks, []
        return {"status": job.status, "stream": [{"output": chunk} for chunk in chunks]}

    def cancel(self, job_id: str, now: float) -> dict[str, Any]:
        """Cancel a queued or running job; a finished one stays as it is."""
        job = self._job(job_id, now)
        if job.status not in FINAL:
            self._stop(job)
            self._finish(job, "CANCELLED", now)
        return {"id": job.id, "status": job.status}

    def retry(self, job_id: str, now: float) -> dict[str, Any]:
        """Queue a FAILED or TIMED_OUT job again under its id; its output and error are dropped."""
        job = self._job(job_id, now)
        if job.status not in ("FAILED", "TIMED_OUT"):
            raise Refused(400, f"job is {job.status}: only FAILED and TIMED_OUT jobs can be retried")
        job.output, job.error = None, None
        job.created = now
        job.dispatches, job.doomed = 0, False
        self._requeue(job, now)
        return {"id": job.id, "status": job.status}

    def purge(self, now: float) -> dict[str, Any]:
        """Drop the queued jobs, not the running ones."""
        self.tick(now)
        waiting = [job for job in self.jobs.values() if job.status == "IN_QUEUE"]
        for job in waiting:
            self._finish(job, "CANCELLED", now)
        self.queue.clear()
        return {"removed": len(waiting), "status": "completed"}

    def health(self, now: float) -> dict[str, Any]:
        """Counts of jobs and workers, under the names that RunPod uses."""
        self.tick(now)
        states = [job.status for job in self.jobs.values()]
        busy = self.busy()
        alive = [worker.id for worker in self.workers.values() if not worker.lost]
        running = sum(worker in busy for worker in alive)
        return {
            "jobs": {
                **self.counts,
                "inProgress": states.count("IN_PROGRESS"),
                "inQueue": states.count("IN_QUEUE"),
            },
            "workers": {
                "idle": len(alive) - running,
                "initializing": 0,
                "ready": len(alive),
                "running": running,
                "throttled": 0,
                "unhealthy": sum(worker.lost for worker in self.workers.values()),
            },
        }

    # --- the worker's side -------------------------------------------------------------------------------------------

    def take(self, worker_id: str, limit: int, now: float) -> list[dict[str, Any]]:
        """Give a worker up to `limit` queued jobs: `{"id", "input"}` each."""
        self.seen(worker_id, now)
        self.tick(now)
        given: list[dict[str, Any]] = []
        while self.queue and len(given) < limit:
            job = self.jobs[self.queue.popleft()]
            job.status, job.worker, job.started = "IN_PROGRESS", worker_id, now
            job.dispatches += 1
            job.doomed = job.doomed or self._strikes("crash", worker_id)
            given.append({"id": job.id, "input": job.input})
        return given

    def done(self, worker_id: str, job_id: str, result: Any, now: float) -> None:
        """Take a worker's result. Raises Refused(400) for one that RunPod would not take."""
        self.seen(worker_id, now)
        self.tick(now)
        job = self.jobs.get(job_id)
        if job is None or job.status != "IN_PROGRESS" or job.worker != worker_id:
            return  # cancelled, timed out, or given to another worker meanwhile
        if not isinstance(result, dict):
            raise Refused(400, "the result must be an object")
        if result.get("status") == "IN_PROGRESS":
            return  # a progress update
        if job.doomed:
            self._lose(job, now)
        elif self._strikes("fail", worker_id):
            job.error = "INTERNAL: fault injected"
            self._finish(job, "FAILED", now)
        elif self._strikes("no_output", worker_id):
            self._finish(job, "COMPLETED", now)
        elif isinstance(result.get("error"), str):
            job.error = result["error"]
            self._finish(job, "FAILED", now)
        else:
            job.output = result.get("output")
            self._finish(job, "COMPLETED", now)
            if self.take_fault("expire"):
                del self.jobs[job.id]

    def chunk(self, worker_id: str, job_id: str, result: Any, now: float) -> None:
        """Take one chunk of a streamed answer."""
        self.seen(worker_id, now)
        job = self.jobs.get(job_id)
        running = job is not None and job.status == "IN_PROGRESS" and job.worker == worker_id
        if job and running and isinstance(result, dict) and "output" in result:
            job.chunks.append(result["output"])

    def seen(self, worker_id: str, now: float) -> None:
        """Note that a worker is alive."""
        worker = self.workers.setdefault(worker_id, Worker(worker_id, now))
        worker.seen, worker.lost = now, False

    def stops_for(self, worker_id: str) -> list[str]:
        """The jobs that a worker must stop, told once."""
        return self.stops.pop(worker_id, [])

    # --- time --------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> None:
        """Apply what time alone brings about: expiry, time limits, retention, lost workers."""
        for worker in self.workers.values():
            worker.lost = worker.lost or now - worker.seen > self.worker_timeout
        for job in list(self.jobs.values()):
            if job.status in FINAL:
                if now - job.finished > job.retention:
                    del self.jobs[job.id]
            elif now - job.created > job.ttl:
                self._stop(job)
                self._leave_queue(job)
                del self.jobs[job.id]  # RunPod forgets it: /status answers 404
            elif job.status == "IN_PROGRESS" and now - job.started > job.execution_timeout:
                self._stop(job)
                job.error = "job timed out"
                self._finish(job, "TIMED_OUT", now)
            elif job.status == "IN_PROGRESS" and job.worker and self.workers[job.worker].lost:
                self._lose(job, now)

    def lose_worker(self, worker_id: str, now: float) -> None:
        """The worker's process has ended: its jobs go back to the queue at once."""
        if worker := self.workers.get(worker_id):
            worker.lost = True
            self.tick(now)
            del self.workers[worker_id]

    def pass_over(self, seconds: float) -> None:
        """The clock was moved by hand: the workers have not been silent meanwhile."""
        for worker in self.workers.values():
            worker.seen += seconds

    def busy(self) -> set[str]:
        """The workers that hold a job."""
        return {job.worker for job in self.jobs.values() if job.status == "IN_PROGRESS" and job.worker}

    # --- faults ------------------------------------------------------------------------------------------------------

    def arm(self, data: Any) -> Fault:
        """Arm a fault from its JSON. Raises Refused(400) that says what is known."""
        return self.faults.arm(data)

    def take_fault(self, kind: str, route: str | None = None) -> Fault | None:
        """Use up one armed fault of this kind (and route), if there is one."""
        return self.faults.take(kind, route)

    def route_faults(self, route: str) -> dict[str, Fault]:
        """Use up the armed faults that strike one request of a route, by kind."""
        return self.faults.of_route(route)

    def _strikes(self, kind: str, worker_id: str) -> bool:
        return self.faults.take(kind, image=self.images.get(worker_id)) is not None

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _job(self, job_id: str, now: float) -> Job:
        self.tick(now)
        if job_id not in self.jobs:
            raise Refused(404, "job not found")
        return self.jobs[job_id]

    def _finish(self, job: Job, status: str, now: float) -> None:
        self._leave_queue(job)
        job.status, job.finished = status, now
        if status == "COMPLETED":
            self.counts["completed"] += 1
        elif status in ("FAILED", "TIMED_OUT"):
            self.counts["failed"] += 1

    def _lose(self, job: Job, now: float) -> None:
        """The worker is gone: give the job out once more, or end it."""
        if job.dispatches < MAX_DISPATCHES:
            self.counts["retried"] += 1
            self._requeue(job, now, front=True)
        else:
            job.error = f"job timed out after {job.dispatches - 1} retries"
            self._finish(job, "FAILED", now)

    def _requeue(self, job: Job, now: float, *, front: bool = False) -> None:
        job.status, job.queued_at, job.worker, job.chunks = "IN_QUEUE", now, None, []
        (self.queue.appendleft if front else self.queue.append)(job.id)

    def _leave_queue(self, job: Job) -> None:
        if job.id in self.queue:
            self.queue.remove(job.id)

    def _stop(self, job: Job) -> None:
        if job.status == "IN_PROGRESS" and job.worker:
            self.stops.setdefault(job.worker, []).append(job.id)
