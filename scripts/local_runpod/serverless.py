"""Serverless endpoints: configuration, releases, and workers that are scaled, rolled and placed. No I/O."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, field
from typing import Any

from local_runpod import bodies, catalog
from local_runpod.basics import (
    CONTAINER_DEFAULTS,
    NO_CAPACITY,
    Log,
    Machine,
    Rejected,
    Usage,
    check_cuda,
    conform,
    missing,
    unfit,
)
from local_runpod.platform import DEFAULT_EXECUTION_TIMEOUT_MS, Platform
from local_runpod.resources import Resources, cpu_config

DAY = 86_400.0
IDLE_SCALE_DOWN = ((7 * DAY, 0), (3 * DAY, 2))  # without a job for so long: at most so many workers
RESTART_DELAY = (0.5, 10.0)  # seconds, doubled from the first to the second while a worker keeps ending at once
CRASHES = 3  # ends in a row, without having asked for a job, after which a worker is unhealthy
POOLS_PLACED = 3  # with more pools the platform accepts the endpoint and never places a worker
# Which fields of an endpoint make a new release, and what a release's diff calls them.
RELEASED = {
    "image": "template.imageName",
    "args": "template.dockerArgs",
    "disk": "template.containerDiskInGb",
    "env": "template.env",
    "ports": "template.ports",
    "registry": "template.containerRegistryAuthId",
    "gpu.pools": "gpuIds",
    "gpu.excludedTypes": "gpuIds.excluded",
    "gpu.count": "gpuCount",
    "gpu.allowedCudaVersions": "allowedCudaVersions",
    "gpu.minCudaVersion": "minCudaVersion",
    "cpu": "instanceIds",
    "dataCenterIds": "locations",
    "networkVolumes": "networkVolumeIds",
    "flashboot": "flashBootType",
}


@dataclass
class Worker:
    """A worker of an endpoint, with the configuration that it was started with."""

    id: str
    version: int
    image: str
    env: dict[str, str]
    created: float
    machine: Machine | None = None
    waits: str = ""  # THROTTLED or INITIALIZING: no machine has been found
    waits_until: float = 0.0
    broken: str | None = None  # why its container never starts
    started: float | None = None  # the container
    ready: float | None = None  # since it has asked for jobs
    idle_since: float = 0.0
    draining: bool = False  # takes no more jobs, ends when it holds none
    ending: bool = False
    process: bool = False  # a process runs for it
    restart_at: float = 0.0
    crashes: int = 0
    usage: Usage | None = None
    log: Log = field(default_factory=Log)


@dataclass
class Release:
    """A version of an endpoint's configuration."""

    id: str
    version: int
    created: float
    diff: list[dict[str, Any]]


@dataclass
class Endpoint:
    """A serverless endpoint: configuration in the API's own shape, queue, releases, workers."""

    id: str
    config: dict[str, Any]
    created: float
    visible_at: float
    idle_since: float
    platform: Platform
    releases: list[Release] = field(default_factory=list)
    workers: dict[str, Worker] = field(default_factory=dict)
    logs: dict[str, Log] = field(default_factory=dict)  # also of workers that have ended
    scaled_at: float = -math.inf

    @property
    def version(self) -> int:
        """The newest release's."""
        return self.releases[-1].version

    def listed(self) -> list[Worker]:
        """The workers that are shown."""
        return [worker for worker in self.workers.values() if not worker.ending]

    def status(self, worker: Worker, busy: set[str]) -> str:
        """The worker's state in RunPod's words."""
        if worker.waits:
            return worker.waits
        if worker.broken:
            return "UNHEALTHY"
        if worker.ready is None:
            return "INITIALIZING"
        return "RUNNING" if worker.id in busy else "IDLE"

    def summary(self) -> dict[str, int]:
        """Counts of workers by state."""
        busy = self.platform.busy()
        states = [self.status(worker, busy) for worker in self.listed()]
        names = ("RUNNING", "IDLE", "INITIALIZING", "THROTTLED", "UNHEALTHY")
        return {**{name.lower(): states.count(name) for name in names}, "total": len(states)}

    def health(self, now: float) -> dict[str, Any]:
        """What the job API's /health says."""
        told = self.platform.health(now)
        counts = self.summary()
        counts.pop("total")
        told["workers"] = {**counts, "ready": counts["idle"] + counts["running"]}
        return told


class Serverless(Resources):
    """The endpoints of an account."""

    def _begin_serverless(self, boot: float | None) -> None:
        self.boot = boot
        self.endpoints: dict[str, Endpoint] = {}

    # --- what time brings about --------------------------------------------------------------------------------------

    def tick_endpoints(self, now: float) -> None:
        """Move every endpoint on to `now`."""
        for endpoint in self.endpoints.values():
            endpoint.platform.tick(now)
            self._scale_down_when_idle(endpoint, now)
            self._move_workers(endpoint, now)
            self._roll(endpoint, now)
            self._scale(endpoint, now)

    def _scale_down_when_idle(self, endpoint: Endpoint, now: float) -> None:
        since = max(endpoint.idle_since, endpoint.platform.asked or -math.inf)
        workers = endpoint.config["workers"]
        for seconds, most in IDLE_SCALE_DOWN:
            if now - since >= seconds and workers["max"] > most:
                workers.update(max=most, min=min(most, workers["min"]))

    def _move_workers(self, endpoint: Endpoint, now: float) -> None:
        busy = endpoint.platform.busy()
        for worker in list(endpoint.workers.values()):
            if worker.waits == "THROTTLED" and now >= worker.waits_until:
                worker.waits = ""
            if not worker.waits and worker.started is None and not worker.ending:
                self._start(endpoint, worker, now)
            if worker.id in busy or worker.ready is None:
                worker.idle_since = now
            if self.boot is not None and worker.ready is None and worker.started is not None and not worker.broken:
                due = worker.started + self.boot
                if now >= due:
                    worker.ready = worker.idle_since = due
            if worker.draining and worker.id not in busy:
                self._end(endpoint, worker, now)

    def _roll(self, endpoint: Endpoint, now: float) -> None:
        """Replace the workers of older releases, one after the other."""
        stale = [worker for worker in endpoint.listed() if worker.version != endpoint.version]
        if not stale:
            return
        busy = endpoint.platform.busy()
        for worker in stale:
            if worker.ready is None:  # it serves nothing
                self._end(endpoint, worker, now)
                self._add(endpoint, now)
        fresh = [worker for worker in endpoint.listed() if worker.version == endpoint.version]
        rolling = any(worker.ready is None for worker in fresh) or any(worker.draining for worker in stale)
        serving = [worker for worker in stale if worker.ready is not None and not worker.ending and not worker.draining]
        if serving and not rolling:
            first = min(serving, key=lambda worker: (worker.id in busy, worker.created))
            first.draining = True
            if first.id not in busy:
                self._end(endpoint, first, now)
            self._add(endpoint, now)

    def _scale(self, endpoint: Endpoint, now: float) -> None:
        bounds = endpoint.config["workers"]
        high = bounds["max"]
        low = min(bounds["min"], high)
        busy = endpoint.platform.busy()
        alive = [worker for worker in endpoint.listed() if not worker.draining]
        for worker in sorted(alive, key=lambda worker: worker.id in busy)[: max(0, len(alive) - high)]:
            worker.draining = True
            if worker.id not in busy:
                self._end(endpoint, worker, now)
        alive = [worker for worker in alive if not worker.draining and not worker.ending]
        wanted = self._wanted(endpoint, alive, now, low, high)
        for _ in range(wanted - len(alive)):
            self._add(endpoint, now)
            endpoint.scaled_at = now
        left = len(alive)
        for worker in alive:
            timeout = bounds.get("idleTimeout", 10)
            if (
                left > wanted
                and worker.ready is not None
                and worker.id not in busy
                and now - worker.idle_since > timeout
            ):
                self._end(endpoint, worker, now)
                left -= 1

    def _wanted(self, endpoint: Endpoint, alive: list[Worker], now: float, low: int, high: int) -> int:
        jobs = endpoint.platform.jobs.values()
        queued = [job.queued_at for job in jobs if job.status == "IN_QUEUE"]
        scaling = endpoint.config["scaling"]
        wanted = 0
        if scaling["type"] == "REQUEST_COUNT":
            running = sum(job.status == "IN_PROGRESS" for job in jobs)
            wanted = math.ceil((len(queued) + running) / scaling["requestCount"])
        elif queued:
            wanted = max(1, len(alive))
            coming = any(worker.ready is None and not worker.broken for worker in alive)
            delay = scaling["queueDelay"]
            if not coming and now - min(queued) > delay and now - endpoint.scaled_at > delay:
                wanted = len(alive) + 1
        return int(min(max(low, wanted), high))

    # --- workers -----------------------------------------------------------------------------------------------------

    def _add(self, endpoint: Endpoint, now: float) -> None:
        if len(endpoint.listed()) >= endpoint.config["workers"]["max"]:
            return
        config = endpoint.config
        worker = Worker(self.make_id(), endpoint.version, config["image"], dict(config["env"]), now, idle_since=now)
        if len((config.get("gpu") or {}).get("pools", ())) > POOLS_PLACED:
            worker.waits, worker.waits_until = "INITIALIZING", math.inf
        elif fault := self.faults.take("throttled", image=worker.image):
            worker.waits, worker.waits_until = "THROTTLED", now + fault.seconds
        elif fault := self.faults.take("unhealthy", image=worker.image):
            worker.broken = fault.message or f"failed to pull image {worker.image}: manifest unknown"
        endpoint.workers[worker.id] = worker
        endpoint.logs[worker.id] = worker.log
        while len(endpoint.logs) > 100:
            endpoint.logs.pop(next(iter(endpoint.logs)))
        endpoint.platform.images[worker.id] = worker.image
        if worker.waits:
            worker.log.add("system", "waiting for a machine", self.when(now))
        else:
            self._start(endpoint, worker, now)

    def _start(self, endpoint: Endpoint, worker: Worker, now: float) -> None:
        """A machine is found."""
        try:
            worker.machine = self._place(endpoint.config)
        except Rejected:  # what the endpoint named is gone
            worker.waits, worker.waits_until = "THROTTLED", math.inf
            return
        worker.started = now
        worker.usage = Usage("serverless", endpoint.id, now, worker.machine.compute, cpu=worker.machine.gpu is None)
        self.usage.append(worker.usage)
        worker.log.add("system", f"pulling image {worker.image}", self.when(now))
        worker.log.add("system", worker.broken or "started", self.when(now))

    def _end(self, endpoint: Endpoint, worker: Worker, now: float) -> None:
        if worker.ending:
            return
        worker.ending = True
        worker.log.add("system", "stopping", self.when(now))
        if worker.usage:
            worker.usage.end = now
        if not worker.process:
            self._forget(endpoint, worker, now)

    def _forget(self, endpoint: Endpoint, worker: Worker, now: float) -> None:
        endpoint.platform.lose_worker(worker.id, now)
        endpoint.workers.pop(worker.id, None)

    def _place(self, config: dict[str, Any]) -> Machine:
        """The first machine that fits."""
        wanted = config["dataCenterIds"] or list(catalog.DATA_CENTERS)
        for volume in config["networkVolumes"]:
            if volume in self.volumes:
                wanted = [self.volumes[volume]["dataCenter"]]
        if cpu := config.get("cpu"):
            flavour, count = catalog.CPUS[cpu[0]["id"]], cpu[0]["vcpuCount"]
            return Machine(None, 0, wanted[0], flavour.serverless * count)
        gpu = config["gpu"]
        for kind in catalog.types_of(gpu["pools"], gpu.get("excludedTypes", [])):
            for center in catalog.centers_with(kind):
                if center.id in wanted:
                    count = gpu["count"]
                    return Machine(kind, count, center.id, catalog.serverless_price(kind) * count)
        raise Rejected(400, NO_CAPACITY)

    def worker(self, worker_id: str) -> tuple[Endpoint, Worker] | None:
        """A worker of any endpoint."""
        for endpoint in self.endpoints.values():
            if found := endpoint.workers.get(worker_id):
                return endpoint, found
        return None

    def seen(self, worker_id: str, now: float) -> bool:
        """A worker asks for jobs. False: it must not get one."""
        found = self.worker(worker_id)
        if not found:
            return False
        worker = found[1]
        if worker.ending or worker.waits or (worker.broken and not worker.crashes):
            return False
        if worker.ready is None:
            worker.ready = worker.idle_since = now
            worker.crashes, worker.broken = 0, None
        return not worker.draining

    def processes(self, now: float) -> list[tuple[Endpoint, Worker]]:
        """The workers for which a process is to be started."""
        return [
            (endpoint, worker)
            for endpoint in self.endpoints.values()
            for worker in endpoint.workers.values()
            if worker.started is not None
            and not (worker.process or worker.ending or worker.waits or (worker.broken and not worker.crashes))
            and now >= worker.restart_at
        ]

    def exited(self, worker_id: str, code: int | None, now: float) -> None:
        """A worker's process has ended: it is started again, unless it was told to end."""
        found = self.worker(worker_id)
        if not found:
            return
        endpoint, worker = found
        worker.process = False
        worker.log.add("system", f"exited with code {code}", self.when(now))
        endpoint.platform.lose_worker(worker.id, now)
        if worker.draining:
            self._end(endpoint, worker, now)
        if worker.ending:
            self._forget(endpoint, worker, now)
            return
        least, most = RESTART_DELAY
        worker.crashes = worker.crashes + 1 if worker.ready is None else 1
        worker.restart_at = now + min(most, least * 2 ** (worker.crashes - 1))
        worker.ready = None
        if worker.crashes >= CRASHES:
            worker.broken = "the container keeps exiting"

    def replace(self, worker_id: str, now: float) -> None:
        """A worker has asked to be replaced, or its machine has failed."""
        if found := self.worker(worker_id):
            self._end(*found, now)

    def environment(self, worker: Worker) -> dict[str, str]:
        """A worker's variables, with the secrets that they name; one whose secret is unknown is left out."""
        known = {}
        for name, value in worker.env.items():
            names = re.findall(r"\{\{\s*RUNPOD_SECRET_(\w+)\s*\}\}", value)
            if all(one in self.secrets for one in names):
                known[name] = re.sub(
                    r"\{\{\s*RUNPOD_SECRET_(\w+)\s*\}\}", lambda found: self.secrets[found.group(1)], value
                )
        return known

    # --- endpoints ---------------------------------------------------------------------------------------------------

    def endpoint(self, endpoint_id: str, now: float) -> Endpoint:
        """An endpoint that is there. Raises Rejected(404)."""
        found = self.endpoints.get(endpoint_id)
        if not found or now < found.visible_at:
            raise missing("serverless endpoint", endpoint_id)
        return found

    def create_endpoint(self, body: Any, now: float) -> Endpoint:
        """POST /v2/serverless."""
        conform(bodies.CREATE_ENDPOINT, body)
        _conform_scaling(body["type"], body["scaling"], body.get("workers", {}))
        if "image" not in body and "templateId" not in body:
            raise unfit("image: is required unless templateId is set")
        if ("gpu" in body) == ("cpu" in body):
            raise Rejected(400, "exactly one of gpu and cpu must be set")
        body = self.from_template(body, serverless=True)
        config: dict[str, Any] = {
            "name": body["name"],
            "type": body["type"],
            **{key: copy.deepcopy(body.get(key, value)) for key, value in CONTAINER_DEFAULTS.items()},
            "image": body["image"],
            "workers": {"min": 0, "max": 3, "idleTimeout": 10, **body.get("workers", {})},
            "scaling": body["scaling"],
            "dataCenterIds": body.get("dataCenterIds", []),
            "networkVolumes": body.get("networkVolumes", []),
            # Not the 300000 of the description: the platform stores 0.
            "timeout": body.get("timeout", 0),
            "flashboot": body.get("flashboot", "OFF"),
        }
        if "gpu" in body:
            given = body["gpu"]
            config["gpu"] = {
                "pools": given["pools"],
                "count": given.get("count", 1),
                "allowedCudaVersions": given.get("allowedCudaVersions", []),
                "minCudaVersion": given.get("minCudaVersion"),
            }
            if excluded := given.get("excludedTypes"):
                config["gpu"]["excludedTypes"] = [one.strip() for one in excluded]
        else:
            config["cpu"] = [cpu_config(one) for one in body["cpu"]]
        self._check_endpoint(config)
        if self.faults.take("no_capacity", "serverless.create"):
            raise Rejected(400, NO_CAPACITY)
        hidden = self.faults.take("propagation", "serverless.create")
        identifier = self.make_id("ep")
        endpoint = Endpoint(
            identifier,
            copy.deepcopy(config),
            now,
            now + (hidden.seconds if hidden else 0.0),
            now,
            Platform(identifier, faults=self.faults),
        )
        endpoint.releases.append(Release(self.make_id(), 1, now, []))
        self._limit(endpoint)
        self.endpoints[identifier] = endpoint
        self.tick_endpoints(now)
        return endpoint

    def update_endpoint(self, endpoint_id: str, body: Any, now: float) -> Endpoint:
        """PATCH /v2/serverless/{id}: what is not named stays."""
        endpoint = self.endpoint(endpoint_id, now)
        conform(bodies.UPDATE_ENDPOINT, body)
        old = endpoint.config
        config = copy.deepcopy(old)
        if "gpu" in body and "cpu" in body:
            raise Rejected(400, "gpu and cpu cannot both be set")
        for family in ("gpu", "cpu"):
            if family in body and family not in config:
                raise Rejected(400, f"this endpoint has no {family}: its compute family cannot be changed")
        if "excludedTypes" in body.get("gpu", {}) and "pools" not in body["gpu"]:
            raise unfit("gpu.excludedTypes: needs gpu.pools beside it")
        if "templateId" in body:
            body = self.from_template(body, serverless=True)
        _conform_scaling(config["type"], body.get("scaling", config["scaling"]), body.get("workers", {}))
        plain = (*CONTAINER_DEFAULTS, *"name image scaling dataCenterIds networkVolumes timeout flashboot".split())
        config.update({key: copy.deepcopy(body[key]) for key in plain if key in body})
        config["workers"].update(body.get("workers", {}))
        if "cpu" in body:
            config["cpu"] = [cpu_config(one) for one in body["cpu"]]
        if "gpu" in body:
            self._update_gpu(config["gpu"], body["gpu"])
        self._check_endpoint(config)
        if config["workers"]["max"] > old["workers"]["max"]:
            endpoint.idle_since = now
        endpoint.config = config
        diff = [
            {"field": name, "old": _at(old, path), "new": _at(config, path)}
            for path, name in RELEASED.items()
            if _at(old, path) != _at(config, path)
        ]
        if diff:
            endpoint.releases.append(Release(self.make_id(), endpoint.version + 1, now, diff))
        self._limit(endpoint)
        self.tick_endpoints(now)
        return endpoint

    def delete_endpoint(self, endpoint_id: str, now: float) -> Endpoint:
        """DELETE /v2/serverless/{id}; gives back what was there."""
        endpoint = self.endpoint(endpoint_id, now)
        for job in list(endpoint.platform.jobs):
            endpoint.platform.cancel(job, now)
        for worker in list(endpoint.workers.values()):
            self._end(endpoint, worker, now)
        del self.endpoints[endpoint_id]
        return endpoint

    def endpoint_view(self, endpoint: Endpoint, base: str) -> dict[str, Any]:
        """An endpoint as it is shown; `base` is where the caller reached this server."""
        shown: dict[str, Any] = {"id": endpoint.id, **copy.deepcopy(endpoint.config)}
        at = f"{base}/v2/{endpoint.id}"
        if shown["type"] == "QUEUE":
            if shown["scaling"]["type"] == "REQUEST_COUNT":
                shown["workers"].pop("idleTimeout", None)
            shown["requestUrls"] = {
                "run": f"{at}/run",
                "runSync": f"{at}/runsync",
                "status": f"{at}/status/JOB_ID",
                "stream": f"{at}/stream/JOB_ID",
                "cancel": f"{at}/cancel/JOB_ID",
                "retry": f"{at}/retry/JOB_ID",
                "purgeQueue": f"{at}/purge-queue",
                "health": f"{at}/health",
            }
        else:
            shown["requestUrls"] = {"base": at, "health": f"{at}/ping"}
        return {**shown, "createdAt": self.stamp(endpoint.created)}

    def list_endpoints(self, now: float, base: str) -> dict[str, Any]:
        """GET /v2/serverless."""
        shown = [one for one in self.endpoints.values() if now >= one.visible_at]
        return {"endpoints": [self.endpoint_view(one, base) for one in shown]}

    def releases_view(self, endpoint: Endpoint) -> dict[str, Any]:
        """GET /v2/serverless/{id}/releases."""
        workers = endpoint.listed()
        fresh = sum(worker.version == endpoint.version for worker in workers)
        return {
            "endpointVersion": endpoint.version,
            "rollout": {
                "inProgress": fresh < len(workers),
                "workersOnLatest": fresh,
                "workersTotal": len(workers),
                "percentOnLatest": 100 * fresh // len(workers) if workers else 0,
            },
            "releases": [
                {
                    "id": release.id,
                    "version": release.version,
                    "source": "MANUAL",
                    "buildId": None,
                    "createdByUserId": None,
                    "workerCount": sum(worker.version == release.version for worker in workers),
                    "createdAt": self.stamp(release.created),
                    "diff": copy.deepcopy(release.diff),
                }
                for release in reversed(endpoint.releases)
            ],
        }

    def workers_view(self, endpoint: Endpoint, now: float) -> dict[str, Any]:
        """GET /v2/serverless/{id}/workers."""
        busy = endpoint.platform.busy()
        return {
            "workers": [self._worker_view(endpoint, worker, busy, now) for worker in endpoint.listed()],
            "summary": endpoint.summary(),
            "endpointVersion": endpoint.version,
        }

    def _worker_view(self, endpoint: Endpoint, worker: Worker, busy: set[str], now: float) -> dict[str, Any]:
        machine = worker.machine
        return {
            "id": worker.id,
            "status": endpoint.status(worker, busy),
            "isStale": worker.version != endpoint.version,
            "version": worker.version,
            "gpuCount": machine.count if machine else 0,
            "image": worker.image,
            "uptimeSeconds": None if worker.started is None else max(0, int(now - worker.started)),
            "gpuTypeId": machine.gpu.id if machine and machine.gpu else None,
            "dataCenterId": machine.center if machine else None,
            "startedAt": self.stamp(worker.started),
        }

    def worker_log(self, endpoint_id: str, worker_id: str, now: float) -> Log:
        """The log of a worker, for a while also of one that has ended."""
        endpoint = self.endpoint(endpoint_id, now)
        if worker_id not in endpoint.logs:
            raise missing("worker", worker_id)
        return endpoint.logs[worker_id]

    def _limit(self, endpoint: Endpoint) -> None:
        endpoint.platform.execution_timeout_ms = endpoint.config["timeout"] or DEFAULT_EXECUTION_TIMEOUT_MS

    def _check_endpoint(self, config: dict[str, Any]) -> None:
        if config["workers"]["min"] > config["workers"]["max"]:
            raise Rejected(400, "workers.min must not be above workers.max")
        if config["timeout"] < 0:
            raise Rejected(400, "timeout must not be negative")
        if gpu := config.get("gpu"):
            check_cuda(gpu)
            for pool in gpu["pools"]:
                if pool not in catalog.POOLS:
                    raise Rejected(400, f"gpu.pools: {pool!r} is not a GPU pool; they are in GET /v2/catalog/gpus")
            members = [kind.id for kind in catalog.types_of(gpu["pools"], [])]
            for excluded in gpu.get("excludedTypes", []):
                if excluded not in members:
                    raise Rejected(400, f"gpu.excludedTypes: {excluded!r} is not a GPU type of these pools")
            if set(members) <= set(gpu.get("excludedTypes", [])):
                raise Rejected(400, "gpu.excludedTypes leaves no GPU type")
        self.check_registry(config["registry"])
        for center in config["dataCenterIds"]:
            if center not in catalog.DATA_CENTERS:
                raise Rejected(400, f"dataCenterIds: {center!r} is not a data center")
        for volume in config["networkVolumes"]:
            if volume not in self.volumes:
                raise Rejected(400, f"networkVolumes: network volume {volume!r} not found")
        self._place(config)

    def _update_gpu(self, gpu: dict[str, Any], given: dict[str, Any]) -> None:
        if "pools" in given:
            gpu["pools"] = given["pools"]
            gpu.pop("excludedTypes", None)  # the two are one selection
            if given.get("excludedTypes"):
                gpu["excludedTypes"] = [one.strip() for one in given["excludedTypes"]]
        for key in ("count", "allowedCudaVersions"):
            if key in given:
                gpu[key] = given[key]
        if "minCudaVersion" in given:
            gpu["minCudaVersion"] = given["minCudaVersion"] or None


def _conform_scaling(kind: str, scaling: dict[str, Any], workers: dict[str, Any]) -> None:
    if kind == "LOAD_BALANCER" and scaling["type"] != "REQUEST_COUNT":
        raise unfit("scaling.type: a load-balancing endpoint scales on REQUEST_COUNT")
    if kind == "QUEUE" and scaling["type"] == "REQUEST_COUNT" and "idleTimeout" in workers:
        raise unfit("workers.idleTimeout: does not apply to a queue-based endpoint that scales on REQUEST_COUNT")


def _at(config: dict[str, Any], path: str) -> Any:
    value: Any = config
    for key in path.split("."):
        value = (value or {}).get(key)
    return value
