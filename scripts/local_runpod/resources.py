"""Templates, registries and network volumes of an account."""

from __future__ import annotations

import copy
from typing import Any

from local_runpod import bodies, catalog
from local_runpod.basics import CONTAINER_DEFAULTS, Rejected, State, Usage, conform, missing, unfit

VOLUME_PRICE = {"STANDARD": 0.07, "HIGH_PERFORMANCE": 0.14}  # dollars for a gigabyte and month
HOURS = 730.0  # of a month
# What every account can read; PATCH and DELETE answer 404.
PUBLIC_TEMPLATE: dict[str, Any] = {
    **CONTAINER_DEFAULTS,
    "id": "runpod-base",
    "name": "Runpod base",
    "image": "runpod/base:1.0.0",
    "mounts": {},
    "serverless": False,
    "public": True,
    "category": "CPU",
    "startSsh": True,
    "startJupyter": False,
    "allowedCudaVersions": [],
}


def cpu_config(given: dict[str, Any]) -> dict[str, Any]:
    """A CPU selection with its memory; refuses one that the catalog does not have."""
    flavour, count = catalog.CPUS.get(given["id"]), int(given["vcpuCount"])
    if not flavour:
        raise Rejected(400, f"cpu: {given['id']!r} is not a CPU flavor; they are in GET /v2/catalog/cpus")
    if count > catalog.CPU_VCPUS[1] or count & (count - 1):
        raise Rejected(400, f"cpu: vcpuCount {count} is not a power of two up to {catalog.CPU_VCPUS[1]}")
    return {"id": flavour.id, "vcpuCount": count, "memory": flavour.memory * count}


class Resources(State):
    """What endpoints and pods refer to."""

    def template(self, template_id: str) -> dict[str, Any]:
        """A template that can be read. Raises Rejected(404)."""
        if template_id == PUBLIC_TEMPLATE["id"]:
            return PUBLIC_TEMPLATE
        if template_id not in self.templates:
            raise missing("template", template_id)
        return self.templates[template_id]

    def check_registry(self, registry: str | None) -> None:
        """Refuse a registry that is not there."""
        if registry is not None and registry not in self.registries:
            raise Rejected(400, f"registry: {registry!r} is not a registry of this account")

    def list_templates(self) -> dict[str, Any]:
        """GET /v2/templates."""
        return {"templates": list(self.templates.values())}

    def create_template(self, body: Any) -> dict[str, Any]:
        """POST /v2/templates."""
        conform(bodies.CREATE_TEMPLATE, body)
        self._unique_template(body["name"])
        self.check_registry(body.get("registry"))
        template = {
            "id": self.make_id(),
            **CONTAINER_DEFAULTS,
            "mounts": {},
            "serverless": False,
            "public": False,
            "category": "NVIDIA",
            "startSsh": True,
            "startJupyter": True,
            "allowedCudaVersions": [],
            **body,
        }
        self.templates[template["id"]] = copy.deepcopy(template)
        return self.templates[template["id"]]

    def update_template(self, template_id: str, body: Any) -> dict[str, Any]:
        """PATCH /v2/templates/{id}: reaches nothing that was made from it."""
        template = self._own_template(template_id)
        conform(bodies.UPDATE_TEMPLATE, body)
        if body.get("name", template["name"]) != template["name"]:
            self._unique_template(body["name"])
        self.check_registry(body.get("registry"))
        changed = copy.deepcopy(body)
        if not changed.get("mounts"):
            changed.pop("mounts", None)
        template.update(changed)
        return template

    def delete_template(self, template_id: str, used: bool) -> None:
        """DELETE /v2/templates/{id}. `used`: a pod was made from it."""
        self._own_template(template_id)
        if used:
            raise Rejected(400, "the template is in use by a pod")
        del self.templates[template_id]

    def _own_template(self, template_id: str) -> dict[str, Any]:
        if template_id not in self.templates:
            raise missing("template", template_id)
        return self.templates[template_id]

    def _unique_template(self, name: str) -> None:
        if any(template["name"] == name for template in self.templates.values()):
            raise Rejected(400, f"a template with the name {name!r} exists already: template names are unique")

    def from_template(self, body: dict[str, Any], *, serverless: bool) -> dict[str, Any]:
        """The body with what its template sets; the template is looked at once and not linked."""
        if "templateId" not in body:
            return body
        template = self.template(body["templateId"])
        if template["serverless"] != serverless:
            raise unfit(f"templateId: is not a {'serverless' if serverless else 'pod'} template")
        taken = {key: template[key] for key in (*CONTAINER_DEFAULTS, "image")}
        merged = {**taken, **body, "env": {**template["env"], **body.get("env", {})}}
        gpu = body.get("gpu")
        if gpu and template["allowedCudaVersions"] and not {"allowedCudaVersions", "minCudaVersion"} & set(gpu):
            merged["gpu"] = {**gpu, "allowedCudaVersions": template["allowedCudaVersions"]}
        return copy.deepcopy(merged)

    # --- registries --------------------------------------------------------------------------------------------------

    def list_registries(self) -> dict[str, Any]:
        """GET /v2/registries; what is secret in them is never shown."""
        return {"registries": [self.registry(registry) for registry in self.registries]}

    def registry(self, registry_id: str) -> dict[str, str]:
        """GET /v2/registries/{id}."""
        if registry_id not in self.registries:
            raise missing("registry", registry_id)
        return {"id": registry_id, "name": self.registries[registry_id]["name"]}

    def create_registry(self, body: Any) -> dict[str, str]:
        """POST /v2/registries."""
        conform(bodies.CREATE_REGISTRY, body)
        if any(registry["name"] == body["name"] for registry in self.registries.values()):
            raise Rejected(400, f"a registry with the name {body['name']!r} exists already: registry names are unique")
        registry_id = self.make_id()
        self.registries[registry_id] = dict(body)
        return self.registry(registry_id)

    def delete_registry(self, registry_id: str, used: bool) -> None:
        """DELETE /v2/registries/{id}: templates lose the reference. `used`: a pod pulls its image with it."""
        self.registry(registry_id)
        if used:
            raise Rejected(400, "the registry is in use by a pod")
        del self.registries[registry_id]
        for template in self.templates.values():
            if template["registry"] == registry_id:
                template["registry"] = None

    # --- network volumes ---------------------------------------------------------------------------------------------

    def list_volumes(self) -> dict[str, Any]:
        """GET /v2/network-volumes."""
        return {"networkVolumes": list(self.volumes.values())}

    def volume(self, volume_id: str) -> dict[str, Any]:
        """GET /v2/network-volumes/{id}."""
        if volume_id not in self.volumes:
            raise missing("network volume", volume_id)
        return self.volumes[volume_id]

    def create_volume(self, body: Any, now: float) -> dict[str, Any]:
        """POST /v2/network-volumes."""
        conform(bodies.CREATE_VOLUME, body)
        center = catalog.DATA_CENTERS.get(body["dataCenter"])
        if not center:
            raise Rejected(400, f"dataCenter: {body['dataCenter']!r} is not a data center")
        kinds = center.volumes
        if not kinds or body.get("type", kinds[0]) not in kinds:
            raise Rejected(400, f"{center.id} has no network volumes of this type; it has {list(kinds)}")
        volume = {"id": self.make_id(length=10), "type": kinds[0], **body, "size": int(body["size"])}
        self.volumes[volume["id"]] = volume
        self._rent(volume, now)
        return volume

    def update_volume(self, volume_id: str, body: Any, now: float) -> dict[str, Any]:
        """PATCH /v2/network-volumes/{id}: storage can only grow."""
        volume = self.volume(volume_id)
        conform(bodies.UPDATE_VOLUME, body)
        if body.get("size", volume["size"]) < volume["size"]:
            raise Rejected(400, f"size: a network volume cannot shrink; it has {volume['size']} GB")
        volume.update(body)
        volume["size"] = int(volume["size"])
        self._rent(volume, now)
        return volume

    def delete_volume(self, volume_id: str, now: float) -> None:
        """DELETE /v2/network-volumes/{id}."""
        self.volume(volume_id)
        self._end_rent(volume_id, now)
        del self.volumes[volume_id]

    def _rent(self, volume: dict[str, Any], now: float) -> None:
        self._end_rent(volume["id"], now)
        price = VOLUME_PRICE[volume["type"]] * volume["size"] / HOURS
        high = volume["type"] == "HIGH_PERFORMANCE"
        self.usage.append(Usage("volume", volume["id"], now, disk=price, high_performance=high))

    def _end_rent(self, volume_id: str, now: float) -> None:
        for usage in self.usage:
            if usage.kind == "volume" and usage.owner == volume_id and usage.end is None:
                usage.end = now
