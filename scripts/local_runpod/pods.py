"""Pods: rented machines. Their states move with time; nothing runs in them here. No I/O."""

from __future__ import annotations

import copy
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
)
from local_runpod.resources import HOURS, Resources, cpu_config

DISK_PRICE = 0.10  # dollars for a gigabyte of container disk and month, while the pod runs
# By status, what can be done with a pod.
ACTIONS = {
    "PROVISIONING": ["stop", "terminate"],
    "STARTING": ["stop", "terminate"],
    "RUNNING": ["stop", "restart", "terminate"],
    "EXITED": ["start", "terminate"],
    "ERROR": ["start", "terminate"],
}


@dataclass
class Pod:
    """A pod: what was asked for, where it runs, and since when it is in its state."""

    id: str
    config: dict[str, Any]
    created: float
    visible_at: float
    machine: Machine
    since: float
    status: str = "PROVISIONING"
    started: float | None = None
    fails: str | None = None  # why it never runs
    usage: Usage | None = None
    log: Log = field(default_factory=Log)


class Pods(Resources):
    """The pods of an account."""

    def _begin_pods(self) -> None:
        self.pods: dict[str, Pod] = {}
        self.pod_seconds = {"PROVISIONING": 1.0, "STARTING": 1.0}  # how long a pod is in these states

    def tick_pods(self, now: float) -> None:
        """Move every pod on to `now`."""
        for pod in self.pods.values():
            while pod.status in self.pod_seconds and now >= (due := pod.since + self.pod_seconds[pod.status]):
                pod.since = due
                if pod.status == "PROVISIONING":
                    pod.log.add("system", f"pulling image {pod.config['image']}", self.when(due))
                    pod.status = "STARTING"
                    if pod.fails:
                        pod.log.add("system", pod.fails, self.when(due))
                        self._stop(pod, "ERROR", due)
                else:
                    pod.log.add("system", "started", self.when(due))
                    pod.status, pod.started = "RUNNING", due

    def pod(self, pod_id: str, now: float) -> Pod:
        """A pod that is there. Raises Rejected(404)."""
        found = self.pods.get(pod_id)
        if not found or now < found.visible_at:
            raise missing("pod", pod_id)
        return found

    def list_pods(self, now: float) -> dict[str, Any]:
        """GET /v2/pods."""
        return {"pods": [self.pod_view(pod, now) for pod in self.pods.values() if now >= pod.visible_at]}

    def create_pod(self, body: Any, now: float) -> Pod:
        """POST /v2/pods."""
        conform(bodies.CREATE_POD, body)
        if "image" not in body and "templateId" not in body:
            raise Rejected(422, "image: is required unless templateId is set", ["image: is required"])
        if ("gpu" in body) == ("cpu" in body):
            raise Rejected(400, "exactly one of gpu and cpu must be set")
        template = body.get("templateId")
        flags = {"startSsh": False, "startJupyter": False}
        if template is not None:
            set_there = self.template(template)
            body = self.from_template(body, serverless=False)
            flags = {key: set_there[key] for key in flags}
            body.setdefault("mounts", copy.deepcopy(set_there["mounts"]))
        self.check_registry(body.get("registry"))
        config: dict[str, Any] = {
            "name": body["name"],
            **{key: copy.deepcopy(body.get(key, value)) for key, value in CONTAINER_DEFAULTS.items()},
            "image": body["image"],
            "mounts": copy.deepcopy(body.get("mounts", {})),
            "cloud": body.get("cloud", "SECURE"),
            "template": template,
            "locked": False,
            "globalNetworking": body.get("globalNetworking", False),
        }
        machine = self._find(body, config)
        if self.faults.take("no_capacity", "pods.create"):
            raise Rejected(400, NO_CAPACITY)
        self._inject(config["env"], {key: body.get(key, value) for key, value in flags.items()})
        hidden = self.faults.take("propagation", "pods.create")
        pod = Pod(self.make_id(), config, now, now + (hidden.seconds if hidden else 0.0), machine, now)
        if fault := self.faults.take("pod_error", "pods.create"):
            pod.fails = fault.message or f"failed to pull image {config['image']}: manifest unknown"
        self.pods[pod.id] = pod
        self._bill(pod, now)
        return pod

    def _find(self, body: dict[str, Any], config: dict[str, Any]) -> Machine:
        """The machine that fits, or a refusal."""
        wanted = list(body.get("dataCenterIds") or catalog.DATA_CENTERS)
        if unknown := [center for center in wanted if center not in catalog.DATA_CENTERS]:
            raise Rejected(400, f"dataCenterIds: {unknown[0]!r} is not a data center")
        mounts = config["mounts"]
        if mounts.get("persistent") and mounts.get("network"):
            raise Rejected(400, "mounts.persistent and mounts.network exclude each other")
        for mount in mounts.get("network", []):
            volume = self.volumes.get(mount["volumeId"])
            if not volume:
                raise Rejected(400, f"mounts.network: network volume {mount['volumeId']!r} not found")
            wanted = [center for center in wanted if center == volume["dataCenter"]]
        if config["globalNetworking"]:
            wanted = [center for center in wanted if catalog.DATA_CENTERS[center].global_network]
        if "cpu" in body:
            if mounts.get("persistent") or config["globalNetworking"]:
                raise Rejected(400, "a CPU pod has neither a persistent mount nor global networking")
            config["cpu"] = cpu_config(body["cpu"])
            if not wanted:
                raise Rejected(400, NO_CAPACITY)
            price = catalog.CPUS[config["cpu"]["id"]].price * config["cpu"]["vcpuCount"]
            return Machine(None, 0, wanted[0], price)
        given = body["gpu"]
        check_cuda(given)
        gpu, count = catalog.GPU.get(given["id"]), int(given.get("count", 1))
        if not gpu:
            raise Rejected(400, f"gpu.id: {given['id']!r} is not a GPU type; they are in GET /v2/catalog/gpus")
        config["gpu"] = {"id": gpu.id, "count": count}
        cloud = config["cloud"].lower()
        view = catalog.gpu_view(gpu)
        centers = [center.id for center in catalog.centers_with(gpu) if center.id in wanted]
        cuda = given.get("allowedCudaVersions") or catalog.CUDA_VERSIONS
        if least := given.get("minCudaVersion"):
            cuda = [version for version in cuda if _version(version) >= _version(least)]
        if (
            not view[cloud]
            or count > view["maxCount"][cloud]
            or not centers
            or not set(cuda) & set(catalog.CUDA_VERSIONS)
        ):
            raise Rejected(400, NO_CAPACITY)
        return Machine(gpu, count, centers[0], view["price"][cloud] * count)

    def _inject(self, env: dict[str, str], flags: dict[str, bool]) -> None:
        if flags["startSsh"] and self.ssh_keys:
            env.setdefault("PUBLIC_KEY", "\n".join(self.ssh_keys))
        if flags["startJupyter"]:
            env.setdefault("JUPYTER_PASSWORD", self.make_id(length=20))

    def update_pod(self, pod_id: str, body: Any, now: float) -> Pod:
        """PATCH /v2/pods/{id}: what is not named stays."""
        pod = self.pod(pod_id, now)
        conform(bodies.UPDATE_POD, body)
        if "templateId" in body:
            body = self.from_template(body, serverless=False)
        self.check_registry(body.get("registry"))
        config = copy.deepcopy(pod.config)
        plain = (*CONTAINER_DEFAULTS, "name", "image", "locked", "globalNetworking")
        config.update({key: copy.deepcopy(body[key]) for key in plain if key in body})
        if config["globalNetworking"] and "cpu" in config:
            raise Rejected(400, "a CPU pod has no global networking")
        for kind, given in body.get("mounts", {}).items():
            old = config["mounts"].get(kind)
            if not old and given:
                raise Rejected(400, f"mounts.{kind}: a mount cannot be added to a pod")
            if kind == "persistent" and given["size"] < old["size"]:
                raise Rejected(400, "mounts.persistent: a mount cannot shrink")
            if kind == "network" and [one["volumeId"] for one in given] != [one["volumeId"] for one in old or []]:
                raise Rejected(400, "mounts.network: the volume of a pod cannot be changed")
            config["mounts"][kind] = copy.deepcopy(given)
        pod.config = config
        return pod

    def delete_pod(self, pod_id: str, now: float) -> None:
        """DELETE /v2/pods/{id}."""
        pod = self.pod(pod_id, now)
        self._stop(pod, "TERMINATED", now)
        del self.pods[pod_id]

    def act_on_pod(self, pod_id: str, body: Any, now: float) -> Pod | None:
        """POST /v2/pods/{id}/action; None: it was terminated."""
        pod = self.pod(pod_id, now)
        conform(bodies.POD_ACTION, body)
        action = body["action"]
        if action not in ACTIONS[pod.status]:
            raise Rejected(409, f"{action} is not possible while the pod is {pod.status}")
        if pod.config["locked"] and action in ("stop", "restart"):
            raise Rejected(409, "the pod is locked")
        if action == "terminate":
            self.delete_pod(pod_id, now)
            return None
        if action == "stop":
            self._stop(pod, "EXITED", now)
        else:
            pod.status, pod.since, pod.started = "PROVISIONING" if action == "start" else "STARTING", now, None
            if action == "start":
                self._bill(pod, now)
        return pod

    def _bill(self, pod: Pod, now: float) -> None:
        disk = pod.config["disk"] * DISK_PRICE / HOURS
        pod.usage = Usage("pod", pod.id, now, pod.machine.compute, disk, cpu=pod.machine.gpu is None)
        self.usage.append(pod.usage)

    def _stop(self, pod: Pod, status: str, now: float) -> None:
        pod.status, pod.since, pod.started = status, now, None
        if pod.usage and pod.usage.end is None:
            pod.usage.end = now
        pod.log.add("system", f"the container has ended: {status}", self.when(now))

    def pod_view(self, pod: Pod, now: float) -> dict[str, Any]:
        """A pod as it is shown."""
        shown = copy.deepcopy(pod.config)
        networked = shown.pop("globalNetworking")
        dns = {"ip": "10.1.0.2", "internalDns": f"{pod.id}.runpod.internal"} if networked else {}
        runtime = None
        if pod.status == "RUNNING" and pod.started is not None:
            runtime = {
                "uptime": max(0, int(now - pod.started)),
                "gpus": [{"util": 0, "memoryUtil": 0} for _ in range(min(pod.machine.count, 64))],
                "cpu": {"util": 0},
                "memory": {"util": 0},
                "ports": [],
            }
        return {
            "id": pod.id,
            **shown,
            "status": pod.status,
            "actions": ACTIONS[pod.status],
            "dataCenterId": pod.machine.center,
            "cudaVersion": catalog.CUDA_VERSIONS[-1] if pod.machine.gpu else None,
            "ssh": {"proxy": None, "direct": None},
            "cost": 0.0 if pod.status == "EXITED" else round(pod.machine.compute, 6),
            "runtime": runtime,
            "createdAt": self.stamp(pod.created),
            "startedAt": self.stamp(pod.started),
            "globalNetworking": {"enabled": networked, **dns},
        }


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))
