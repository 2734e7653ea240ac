"""HTTP for the management API: which route asks the account for what, and how refusals and logs are sent."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from urllib.parse import unquote

from aiohttp import web
from multidict import MultiMapping

from local_runpod import catalog
from local_runpod.basics import Log, Rejected, missing
from local_runpod.billing import BUCKETS, KINDS, Window, window
from local_runpod.management import Account
from local_runpod.resources import PUBLIC_TEMPLATE

BODY_MAX_BYTES = 1_000_000
AREAS = "serverless|pods|templates|registries|network-volumes|catalog|billing|account"
QUOTAS = (("minute", 60, 60), ("hour", 3000, 3600), ("day", 50000, 86400))
LOG_TAIL = (100, 5000)  # default, most


@dataclass
class Call:
    """A request: its body, its query, when it came, and under which address this server was reached."""

    body: Any
    query: MultiMapping[str]
    now: float
    base: str

    def one(self, name: str) -> str | None:
        """A parameter's value."""
        return self.query.get(name)

    def many(self, name: str, known: tuple[str, ...] = (), pattern: str = "") -> tuple[str, ...]:
        """The values of a parameter that are separated by commas."""
        values = tuple(value for part in self.query.getall(name, []) for value in part.split(","))
        for value in values:
            if (known and value not in known) or not re.fullmatch(pattern or ".*", value, re.DOTALL):
                raise unfit(name, f"must be {' or '.join(known) if known else f'like {pattern}'}")
        return values

    def choice(self, name: str, known: tuple[str, ...]) -> str | None:
        """A parameter's value, one of those known."""
        value = self.one(name)
        if value is not None and value not in known:
            raise unfit(name, f"must be one of {', '.join(known)}")
        return value

    def whole(self, name: str, low: int, high: int | None = None) -> int | None:
        """A whole number."""
        value = self.one(name)
        if value is None:
            return None
        if not re.fullmatch("[0-9]{1,18}", value) or int(value) < low or (high is not None and int(value) > high):
            raise unfit(name, f"must be a whole number of at least {low}{f' and at most {high}' if high else ''}")
        return int(value)

    def time(self, name: str) -> datetime | None:
        """A time in RFC 3339."""
        return parse_time(self.one(name), name)


def unfit(name: str, why: str) -> Rejected:
    """A parameter that is not as it should be."""
    return Rejected(422, f"{name}: {why}", [f"{name}: {why}"])


def parse_time(value: str | None, name: str) -> datetime | None:
    """A time in RFC 3339; None stays None."""
    if value is None:
        return None
    if re.fullmatch(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)", value, re.ASCII):
        try:
            return datetime.fromisoformat(value.upper())
        except ValueError:
            pass
    raise unfit(name, "must be a time like 2026-06-01T00:00:00Z")


Answer = tuple[int, Any]
Route = Callable[..., Answer]


class Api:
    """The routes over one account."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self._minute = (0.0, 0)  # when the minute began, requests in it
        # Method, path below /v2 ({} is an id), the name for faults, what serves it. A log is served by its own route.
        self.routes: list[tuple[str, str, str, Route]] = [
            ("GET", "serverless", "serverless.list", self._list_endpoints),
            ("POST", "serverless", "serverless.create", self._create_endpoint),
            ("GET", "serverless/{}", "serverless.get", self._get_endpoint),
            ("PATCH", "serverless/{}", "serverless.patch", self._update_endpoint),
            ("DELETE", "serverless/{}", "serverless.delete", self._delete_endpoint),
            ("GET", "serverless/{}/workers", "serverless.workers", self._workers),
            ("GET", "serverless/{}/releases", "serverless.releases", self._releases),
            ("GET", "serverless/{}/workers/{}/logs", "serverless.logs", self._worker_log),
            ("GET", "pods", "pods.list", self._list_pods),
            ("POST", "pods", "pods.create", self._create_pod),
            ("GET", "pods/{}", "pods.get", self._get_pod),
            ("PATCH", "pods/{}", "pods.patch", self._update_pod),
            ("DELETE", "pods/{}", "pods.delete", self._delete_pod),
            ("POST", "pods/{}/action", "pods.action", self._act_on_pod),
            ("GET", "pods/{}/logs", "pods.logs", self._pod_log),
            ("GET", "templates", "templates", lambda _: (200, account.list_templates())),
            ("POST", "templates", "templates", lambda call: (201, account.create_template(call.body))),
            ("GET", "templates/{}", "templates", lambda _, name: (200, account.template(name))),
            ("PATCH", "templates/{}", "templates", lambda call, name: (200, account.update_template(name, call.body))),
            ("DELETE", "templates/{}", "templates", self._delete_template),
            ("GET", "registries", "registries", lambda _: (200, account.list_registries())),
            ("POST", "registries", "registries", lambda call: (201, account.create_registry(call.body))),
            ("GET", "registries/{}", "registries", lambda _, name: (200, account.registry(name))),
            ("DELETE", "registries/{}", "registries", self._delete_registry),
            ("GET", "network-volumes", "network-volumes", lambda _: (200, account.list_volumes())),
            ("POST", "network-volumes", "network-volumes", self._create_volume),
            ("GET", "network-volumes/{}", "network-volumes", lambda _, name: (200, account.volume(name))),
            ("PATCH", "network-volumes/{}", "network-volumes", self._update_volume),
            ("DELETE", "network-volumes/{}", "network-volumes", self._delete_volume),
            ("GET", "account/ssh-keys", "account", lambda _: (200, {"keys": account.ssh_keys})),
            ("PUT", "account/ssh-keys", "account", lambda call: (200, account.set_ssh_keys(call.body))),
            ("GET", "billing", "billing", self._bill),
            ("GET", "billing/endpoints", "billing", self._bill_of_none),
            *(("GET", f"billing/{what}", "billing", lambda call, what=what: self._bill(call, what)) for what in KINDS),
            ("GET", "catalog/gpus", "catalog", self._gpus),
            ("GET", "catalog/gpus/{}", "catalog", self._gpu),
            ("GET", "catalog/cpus", "catalog", self._cpus),
            ("GET", "catalog/cpus/{}", "catalog", self._cpu),
            ("GET", "catalog/datacenters", "catalog", self._centers),
            ("GET", "catalog/datacenters/{}", "catalog", self._center),
            ("GET", "catalog/templates", "catalog", self._public_templates),
        ]

    def find(self, method: str, raw_path: str) -> tuple[str, Route, list[str]]:
        """Who serves a request: the name for faults, the route, the ids. Raises Rejected(404 or 405)."""
        parts = [unquote(part) for part in raw_path.removeprefix("/v2/").split("/")]
        allowed: list[str] = []
        for verb, path, name, route in self.routes:
            wanted = path.split("/")
            if len(wanted) == len(parts) and all(
                want in ("{}", part) and part for want, part in zip(wanted, parts, strict=True)
            ):
                if verb == method:
                    return name, route, [part for want, part in zip(wanted, parts, strict=True) if want == "{}"]
                allowed.append(verb)
        if allowed:
            raise NotAllowed(allowed)
        raise Rejected(404, f"{method} {'/'.join(['/v2', *parts])} is not a route of this API")

    # --- quotas ------------------------------------------------------------------------------------------------------

    def quota(self, now: float) -> tuple[dict[str, str], float | None]:
        """The headers of an answer, and how long to wait where an armed quota is used up."""
        fault = self.account.faults.armed("rate_limit")
        begun, count = self._minute
        if now - begun >= 60:
            begun, count = now, 0
        count += 1
        self._minute = (begun, count)
        left = 60 - int(now - begun)
        quotas = [(name, fault.times if fault and name == "minute" else most, span) for name, most, span in QUOTAS]
        headers = {
            "RateLimit": ", ".join(
                f'"{name}";r={max(0, most - count)};t={left if name == "minute" else span}'
                for name, most, span in quotas
            ),
            "RateLimit-Policy": ", ".join(f'"{name}";q={most};w={span}' for name, most, span in quotas),
        }
        return headers, float(left) if fault and count > fault.times else None

    # --- serverless --------------------------------------------------------------------------------------------------

    def _list_endpoints(self, call: Call) -> Answer:
        return 200, self.account.list_endpoints(call.now, call.base)

    def _create_endpoint(self, call: Call) -> Answer:
        return 201, self.account.endpoint_view(self.account.create_endpoint(call.body, call.now), call.base)

    def _get_endpoint(self, call: Call, endpoint: str) -> Answer:
        return 200, self.account.endpoint_view(self.account.endpoint(endpoint, call.now), call.base)

    def _update_endpoint(self, call: Call, endpoint: str) -> Answer:
        return 200, self.account.endpoint_view(self.account.update_endpoint(endpoint, call.body, call.now), call.base)

    def _delete_endpoint(self, call: Call, endpoint: str) -> Answer:
        self.account.delete_endpoint(endpoint, call.now)
        return 204, None

    def _workers(self, call: Call, endpoint: str) -> Answer:
        return 200, self.account.workers_view(self.account.endpoint(endpoint, call.now), call.now)

    def _releases(self, call: Call, endpoint: str) -> Answer:
        return 200, self.account.releases_view(self.account.endpoint(endpoint, call.now))

    def _worker_log(self, call: Call, endpoint: str, worker: str) -> Answer:
        return 200, self.account.worker_log(endpoint, worker, call.now)

    # --- pods, and what they refer to --------------------------------------------------------------------------------

    def _list_pods(self, call: Call) -> Answer:
        call.choice("includeClusterPods", ("true", "false"))
        return 200, self.account.list_pods(call.now)

    def _create_pod(self, call: Call) -> Answer:
        return 201, self.account.pod_view(self.account.create_pod(call.body, call.now), call.now)

    def _get_pod(self, call: Call, pod: str) -> Answer:
        return 200, self.account.pod_view(self.account.pod(pod, call.now), call.now)

    def _update_pod(self, call: Call, pod: str) -> Answer:
        return 200, self.account.pod_view(self.account.update_pod(pod, call.body, call.now), call.now)

    def _delete_pod(self, call: Call, pod: str) -> Answer:
        self.account.delete_pod(pod, call.now)
        return 204, None

    def _act_on_pod(self, call: Call, pod: str) -> Answer:
        left = self.account.act_on_pod(pod, call.body, call.now)
        return (200, self.account.pod_view(left, call.now)) if left else (204, None)

    def _pod_log(self, call: Call, pod: str) -> Answer:
        return 200, self.account.pod(pod, call.now).log

    def _delete_template(self, call: Call, template: str) -> Answer:
        used = any(pod.config["template"] == template for pod in self.account.pods.values())
        self.account.delete_template(template, used)
        return 204, None

    def _delete_registry(self, call: Call, registry: str) -> Answer:
        used = any(pod.config["registry"] == registry for pod in self.account.pods.values())
        self.account.delete_registry(registry, used)
        return 204, None

    def _create_volume(self, call: Call) -> Answer:
        return 201, self.account.create_volume(call.body, call.now)

    def _update_volume(self, call: Call, volume: str) -> Answer:
        return 200, self.account.update_volume(volume, call.body, call.now)

    def _delete_volume(self, call: Call, volume: str) -> Answer:
        self.account.delete_volume(volume, call.now)
        return 204, None

    # --- billing -----------------------------------------------------------------------------------------------------

    def _window(self, call: Call) -> Window:
        size = call.choice("bucketSize", BUCKETS)
        now = self.account.when(call.now)
        return window(now, size, call.whole("lastN", 1), call.time("startTime"), call.time("endTime"))

    def _bill(self, call: Call, what: str = "") -> Answer:
        asked = self._window(call)
        if not what:
            return 200, self.account.bill_of_all(asked, call.now)
        return 200, self.account.bill(what, asked, call.one(KINDS[what].owner), call.now)

    def _bill_of_none(self, call: Call) -> Answer:
        return 200, self.account.bill_of_none(self._window(call))

    # --- catalog -----------------------------------------------------------------------------------------------------

    def _gpu_options(self, call: Call) -> dict[str, Any]:
        include = call.many("include", ("AVAILABILITY",))
        if len(include) > 1:
            raise unfit("include", "must have at most 1 item")
        options: dict[str, Any] = {"availability": bool(include)}
        options["products"] = call.many("product", ("POD", "CLUSTER", "SERVERLESS"))
        options["count"] = call.whole("count", 1)
        options["cloud"] = call.choice("cloud", ("SECURE", "COMMUNITY"))
        options["countries"] = call.many("countryCodes", pattern="[A-Z]{2}")
        exact = call.many("cudaVersions", pattern="[0-9]+[.][0-9]+")
        least = call.one("minCudaVersion")
        if least is not None and not re.fullmatch("[0-9]{1,9}([.][0-9]{1,9})?", least):
            raise unfit("minCudaVersion", "must be like 12 or 12.1")
        if include and not options["products"]:
            raise Rejected(400, "include=AVAILABILITY needs product")
        given = [value for key, value in options.items() if key != "availability"]
        if not include and (any(given) or exact or least):
            raise Rejected(400, "product and the filters need include=AVAILABILITY")
        if exact and least:
            raise Rejected(400, "cudaVersions and minCudaVersion exclude each other")
        options["count"] = options["count"] or 1
        options["cuda"] = tuple(
            version
            for version in catalog.CUDA_VERSIONS
            if (not exact or version in exact) and (not least or _version(version) >= _version(least))
        )
        return options

    def _gpus(self, call: Call) -> Answer:
        options = self._gpu_options(call)
        countries = options["countries"]
        shown = [
            gpu
            for gpu in catalog.GPUS
            if not countries or any(center.country in countries for center in catalog.centers_with(gpu))
        ]
        return 200, {"gpus": [catalog.gpu_view(gpu, **options) for gpu in shown]}

    def _gpu(self, call: Call, gpu: str) -> Answer:
        options = self._gpu_options(call)
        if gpu not in catalog.GPU:
            raise missing("GPU type", gpu)
        return 200, catalog.gpu_view(catalog.GPU[gpu], **options)

    def _cpu_options(self, call: Call) -> bool:
        include = call.many("include", ("AVAILABILITY",))
        product = call.many("product", ("POD", "SERVERLESS"))
        count = call.whole("vcpuCount", 2)
        if len(include) > 1:
            raise unfit("include", "must have at most 1 item")
        if bool(include) != bool(product) or (count and not include):
            raise Rejected(400, "include=AVAILABILITY and product need each other, vcpuCount needs both")
        if count and count & (count - 1):
            raise Rejected(400, "vcpuCount must be a power of two")
        return bool(include)

    def _cpus(self, call: Call) -> Answer:
        availability = self._cpu_options(call)
        return 200, {"cpus": [catalog.cpu_view(cpu, availability=availability) for cpu in catalog.CPUS.values()]}

    def _cpu(self, call: Call, cpu: str) -> Answer:
        availability = self._cpu_options(call)
        if cpu not in catalog.CPUS:
            raise missing("CPU flavor", cpu)
        return 200, catalog.cpu_view(catalog.CPUS[cpu], availability=availability)

    def _centers(self, call: Call) -> Answer:
        include = call.many("include", CENTER_INCLUDE)
        regions = call.many("regions", REGIONS)
        volumes = call.many("networkVolumeTypes", ("STANDARD", "HIGH_PERFORMANCE"))
        compliance = call.many("compliance", COMPLIANCE)
        network = call.choice("globalNetwork", ("true", "false"))
        shown = [
            center
            for center in catalog.DATA_CENTERS.values()
            if (not regions or center.region in regions)
            and set(volumes) <= set(center.volumes)
            and set(compliance) <= set(center.compliance)
            and network in (None, str(center.global_network).lower())
        ]
        return 200, {"dataCenters": [catalog.center_view(center, include) for center in shown]}

    def _center(self, call: Call, center: str) -> Answer:
        include = call.many("include", CENTER_INCLUDE)
        if center not in catalog.DATA_CENTERS:
            raise missing("data center", center)
        return 200, catalog.center_view(catalog.DATA_CENTERS[center], include)

    def _public_templates(self, call: Call) -> Answer:
        source = call.choice("source", ("official", "verified", "community"))
        return 200, {"templates": [PUBLIC_TEMPLATE] if source in (None, "official") else []}


CENTER_INCLUDE = ("GPU_AVAILABILITY", "CPU_AVAILABILITY")
REGIONS = tuple("NORTH_AMERICA SOUTH_AMERICA EUROPE ASIA MIDDLE_EAST AFRICA OCEANIA ANTARCTICA UNKNOWN".split())
COMPLIANCE = tuple(
    "GDPR ISO_IEC_27001 ISO_14001 PCI_DSS HITRUST SOC_1_TYPE_2 SOC_2_TYPE_2 SOC_3_TYPE_2 ITAR FISMA_HIGH HIPAA"
    " RENEWABLE".split()
)


class NotAllowed(Rejected):
    """A method that a path does not have."""

    def __init__(self, allowed: list[str]) -> None:
        super().__init__(405, f"only {', '.join(allowed)} are allowed here")
        self.allowed = ", ".join(allowed)


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor or 0)


async def stream_log(
    request: web.Request, log: Log, call: Call, headers: dict[str, str], hold: float
) -> web.StreamResponse:
    """Send a log as server-sent events: what is asked of the past, then what comes, until nothing has for `hold` s."""
    source = call.choice("source", ("container", "system"))
    tail = call.whole("tail", 0, LOG_TAIL[1])
    cursor = request.headers.get("Last-Event-ID")
    resume = parse_time(cursor and cursor.partition("/")[0], "Last-Event-ID")
    since = call.time("since")

    def wanted(after: datetime | None) -> list[tuple[datetime, Any]]:
        lines = [(datetime.fromisoformat(line.ts), line) for line in log.lines if source in (None, line.source)]
        return [line for line in lines if after is None or line[0] > after]

    if resume or since:
        first = wanted(resume or (since - timedelta(microseconds=1) if since else None))
    else:
        count = LOG_TAIL[0] if tail is None else tail
        first = wanted(None)[-count:] if count else []
    sent = max((datetime.fromisoformat(line.ts) for line in log.lines), default=None)
    response = web.StreamResponse(
        headers={**headers, "Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    )
    await response.prepare(request)
    quiet = 0.0
    while True:
        for _, line in first:
            data = json.dumps({"source": line.source, "line": line.line, "ts": line.ts})
            await response.write(f"id: {line.ts}\ndata: {data}\n\n".encode())
        if quiet >= hold:
            break
        step = min(0.05, hold)
        await asyncio.sleep(step)
        first = wanted(sent)
        quiet = 0.0 if first else quiet + step
        sent = first[-1][0] if first else sent
    await response.write_eof()
    return response
