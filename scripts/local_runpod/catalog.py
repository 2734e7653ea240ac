"""What can be rented: GPU types and pools, CPU flavours, data centres, and their prices, as of late 2026.

Prices are US dollars an hour for one GPU. Where they are from:
serverless   docs.runpod.io/serverless/pricing, per-second prices of flex workers times 3600 (2026-06-08); the RTX 5090's
             is not listed there
pods         RunPod's pricing page as of 2026-10-07 (A100 PCIe, H100 SXM, H200, B200); prices that RunPod's own tools
             printed in August and September 2026 (A4000, A40, A6000, L40S, RTX 4090, RTX 5090); a price list of a third
             party, March 2026 (L4, L40, A100 SXM, H100 PCIe). A type whose pod price was not seen is not offered for
             pods here.
Stock is made up and always high: a shortage is armed as a fault. CPU prices are the OpenAPI file's examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

CUDA_VERSIONS = ("12.6", "12.8", "13.0")


@dataclass(frozen=True)
class Gpu:
    """A GPU type. A pod price of 0 says that this cloud does not offer it."""

    id: str
    name: str
    pool: str
    memory: int
    secure: float = 0.0
    community: float = 0.0


# By pool id: price of serverless, None where no price is listed.
POOLS: dict[str, float | None] = {
    "AMPERE_16": 0.576,
    "AMPERE_24": 0.684,
    "ADA_24": 1.116,
    "ADA_32_PRO": None,
    "AMPERE_48": 1.224,
    "ADA_48_PRO": 1.908,
    "AMPERE_80": 2.736,
    "ADA_80_PRO": 4.176,
    "BLACKWELL_96": 3.996,
    "HOPPER_141": 5.58,
    "BLACKWELL_180": 8.64,
}
GPUS = (
    Gpu("NVIDIA RTX A4000", "RTX A4000", "AMPERE_16", 16, 0.17),
    Gpu("NVIDIA RTX A4500", "RTX A4500", "AMPERE_16", 20),
    Gpu("NVIDIA RTX 4000 Ada Generation", "RTX 4000 Ada", "AMPERE_16", 20),
    Gpu("NVIDIA RTX 2000 Ada Generation", "RTX 2000 Ada", "AMPERE_16", 16),
    Gpu("NVIDIA RTX A5000", "RTX A5000", "AMPERE_24", 24),
    Gpu("NVIDIA L4", "L4", "AMPERE_24", 24, 0.44),
    Gpu("NVIDIA GeForce RTX 3090", "RTX 3090", "AMPERE_24", 24),
    Gpu("NVIDIA GeForce RTX 4090", "RTX 4090", "ADA_24", 24, 0.69, 0.34),
    Gpu("NVIDIA GeForce RTX 5090", "RTX 5090", "ADA_32_PRO", 32, 0.99, 0.69),
    Gpu("NVIDIA A40", "A40", "AMPERE_48", 48, 0.44),
    Gpu("NVIDIA RTX A6000", "RTX A6000", "AMPERE_48", 48, 0.53),
    Gpu("NVIDIA L40", "L40", "ADA_48_PRO", 48, 0.69),
    Gpu("NVIDIA L40S", "L40S", "ADA_48_PRO", 48, 0.99),
    Gpu("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada", "ADA_48_PRO", 48),
    Gpu("NVIDIA A100 80GB PCIe", "A100 PCIe", "AMPERE_80", 80, 1.59, 1.19),
    Gpu("NVIDIA A100-SXM4-80GB", "A100 SXM", "AMPERE_80", 80, 1.39),
    Gpu("NVIDIA H100 PCIe", "H100 PCIe", "ADA_80_PRO", 80, 1.99),
    Gpu("NVIDIA H100 80GB HBM3", "H100 SXM", "ADA_80_PRO", 80, 3.49),
    Gpu("NVIDIA H100 NVL", "H100 NVL", "ADA_80_PRO", 94),
    Gpu("NVIDIA RTX PRO 6000 Blackwell Server Edition", "RTX PRO 6000", "BLACKWELL_96", 96),
    Gpu("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 WK", "BLACKWELL_96", 96),
    Gpu("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 MaxQ", "BLACKWELL_96", 96),
    Gpu("NVIDIA H200", "H200 SXM", "HOPPER_141", 141, 4.59),
    Gpu("NVIDIA B200", "B200", "BLACKWELL_180", 180, 6.79),
)
GPU = {gpu.id: gpu for gpu in GPUS}


@dataclass(frozen=True)
class Cpu:
    """A CPU flavour: gigabytes and dollars an hour are for each vCPU."""

    id: str
    name: str
    group: str
    memory: int
    price: float = 0.04
    serverless: float = 0.03


CPUS = {
    cpu.id: cpu
    for cpu in (
        Cpu("cpu3c", "Compute-Optimized", "Gen 3", 2),
        Cpu("cpu3g", "General Purpose", "Gen 3", 4),
        Cpu("cpu5c", "Compute-Optimized", "Gen 5", 2),
        Cpu("cpu5g", "General Purpose", "Gen 5", 4),
    )
}
CPU_VCPUS = (2, 32)


@dataclass(frozen=True)
class DataCenter:
    """A data centre. `lacks` are the pools that it does not hold."""

    id: str
    name: str
    region: str
    country: str
    volumes: tuple[str, ...] = ("STANDARD",)
    compliance: tuple[str, ...] = ("SOC_2_TYPE_2",)
    global_network: bool = True
    lacks: tuple[str, ...] = ()


# Which there are is RunPod's; which pools each lacks is made up, so that a narrow choice can be empty.
DATA_CENTERS = {
    center.id: center
    for center in (
        DataCenter("US-KS-2", "US Kansas 2", "NORTH_AMERICA", "US", ("STANDARD", "HIGH_PERFORMANCE")),
        DataCenter("US-CA-2", "US California 2", "NORTH_AMERICA", "US", lacks=("AMPERE_16", "AMPERE_24")),
        DataCenter("US-TX-3", "US Texas 3", "NORTH_AMERICA", "US", global_network=False, lacks=("BLACKWELL_180",)),
        DataCenter("CA-MTL-1", "CA Montreal 1", "NORTH_AMERICA", "CA", lacks=("HOPPER_141", "BLACKWELL_180")),
        DataCenter("EU-RO-1", "EU Romania 1", "EUROPE", "RO", compliance=("GDPR", "SOC_2_TYPE_2")),
        DataCenter("EU-CZ-1", "EU Czechia 1", "EUROPE", "CZ", compliance=("GDPR",), lacks=("AMPERE_80", "HOPPER_141")),
        DataCenter("EUR-IS-1", "EUR Iceland 1", "EUROPE", "IS", (), ("GDPR", "RENEWABLE"), lacks=("ADA_24",)),
        DataCenter("AP-JP-1", "AP Japan 1", "ASIA", "JP", (), (), False, ("AMPERE_16", "AMPERE_24", "BLACKWELL_96")),
    )
}


def serverless_price(gpu: Gpu) -> float:
    """What a second of a worker is computed from, an hour and GPU: the pool's price, else the pod's."""
    return POOLS[gpu.pool] or gpu.secure


def types_of(pools: list[str], excluded: list[str]) -> list[Gpu]:
    """The types of these pools less the excluded ones, in the order of the pools."""
    return [gpu for pool in pools for gpu in GPUS if gpu.pool == pool and gpu.id not in excluded]


def centers_with(gpu: Gpu) -> list[DataCenter]:
    """Where a type can be had."""
    return [center for center in DATA_CENTERS.values() if gpu.pool not in center.lacks]


def gpu_view(
    gpu: Gpu,
    *,
    availability: bool = False,
    cloud: str | None = None,
    products: tuple[str, ...] = (),
    count: int = 1,
    countries: tuple[str, ...] = (),
    cuda: tuple[str, ...] = CUDA_VERSIONS,
) -> dict[str, Any]:
    """A GPU type as the catalog shows it."""
    price: dict[str, Any] = {"secure": gpu.secure, "community": gpu.community}
    if (serverless := POOLS[gpu.pool]) is not None:
        price["serverless"] = serverless
    most = {"secure": 8 if gpu.secure else 0, "community": 4 if gpu.community else 0}
    shown: dict[str, Any] = {
        "id": gpu.id,
        "name": gpu.name,
        "pool": gpu.pool,
        "manufacturer": "NVIDIA",
        "memory": gpu.memory,
        "secure": gpu.secure > 0,
        "community": gpu.community > 0,
        "price": price,
        "maxCount": most,
    }
    if not availability:
        return shown
    centers = [center for center in centers_with(gpu) if not countries or center.country in countries]
    clouds = (cloud.lower(),) if cloud else ("secure", "community")
    as_pod = any(price[name] and count <= most[name] for name in clouds)
    offered = bool(cuda and centers) and (as_pod or ("SERVERLESS" in products and count <= 8))
    shown["availability"] = "HIGH" if offered else "NONE"
    if offered:
        shown["dataCenters"] = [{"id": one.id, "name": one.name, "availability": "HIGH"} for one in centers]
    shown["cudaVersions"] = [{"version": version, "available": offered} for version in cuda]
    return shown


def cpu_view(cpu: Cpu, *, availability: bool = False) -> dict[str, Any]:
    """A CPU flavour as the catalog shows it."""
    shown: dict[str, Any] = {
        "id": cpu.id,
        "name": cpu.name,
        "group": cpu.group,
        "vcpu": {"min": CPU_VCPUS[0], "max": CPU_VCPUS[1]},
        "ramGbPerVcpu": cpu.memory,
        "price": {"securePerVcpu": cpu.price, "serverlessPerVcpu": cpu.serverless},
    }
    if availability:
        shown["availability"] = "HIGH"
        shown["dataCenters"] = [
            {"id": one.id, "name": one.name, "availability": "HIGH"} for one in DATA_CENTERS.values()
        ]
    return shown


def center_view(center: DataCenter, include: tuple[str, ...] = ()) -> dict[str, Any]:
    """A data centre as the catalog shows it."""
    shown: dict[str, Any] = {
        "id": center.id,
        "name": center.name,
        "region": center.region,
        "globalNetwork": center.global_network,
        "networkVolumeTypes": list(center.volumes),
        "compliance": list(center.compliance),
    }
    if "GPU_AVAILABILITY" in include:
        held = [gpu for gpu in GPUS if gpu.pool not in center.lacks]
        shown["gpuAvailability"] = [{"id": gpu.id, "name": gpu.name, "availability": "HIGH"} for gpu in held]
    if "CPU_AVAILABILITY" in include:
        shown["cpuAvailability"] = [{"id": cpu.id, "name": cpu.name, "availability": "HIGH"} for cpu in CPUS.values()]
    return shown
