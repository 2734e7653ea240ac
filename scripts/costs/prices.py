"""What a GPU costs an hour, and where that is from: RunPod's live catalog, else the dated table in config/prices.yaml."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml_file
from common.problems import Problem
from common.urls import is_near
from models import Range
from runpod_api import ApiError

Product = Literal["serverless", "pod"]
PRODUCTS: tuple[Product, ...] = ("serverless", "pod")
_BUDGET = 15.0  # seconds that the catalog is asked for: the table is there
_DATE = re.compile(r"\d{4}-\d{2}(-\d{2})?")


@dataclass(frozen=True)
class Source:
    """Where a price is from, and of which day (or month) it is."""

    name: str
    date: str


@dataclass(frozen=True)
class Gpu:
    """A GPU type. Prices are US dollars per hour of one; None: not offered, or not known."""

    id: str
    name: str
    pool: str | None
    memory: int
    serverless: float | None = None
    secure: float | None = None
    community: float | None = None


@dataclass(frozen=True)
class Catalog:
    """GPU types with their prices, from one place. `stock`: (product, type) → RunPod's word for how many are free."""

    gpus: tuple[Gpu, ...]
    sources: Mapping[Product, Source]
    stock: Mapping[tuple[Product, str], str]


@dataclass(frozen=True)
class Price:
    """US dollars per hour for all GPUs of a worker or pod. `what`: the pool or GPU type that it is the price of."""

    usd_per_hour: Range
    what: str
    count: int
    source: Source
    stock: str | None = None
    note: str = ""


class Prices:
    """Prices by pool, card or machine: of the first catalog that has them."""

    def __init__(self, catalogs: Sequence[Catalog]) -> None:
        self.catalogs = tuple(catalogs)

    def pool(self, pool: str, count: int = 1) -> Price | None:
        """A serverless worker with `count` GPUs of a pool; None: its price is not known."""
        for catalog in self.catalogs:
            types = [gpu for gpu in catalog.gpus if gpu.pool == pool and gpu.serverless]
            if types:
                found = sorted(gpu.serverless or 0.0 for gpu in types)
                usd = Range(count * found[0], count * found[0], count * found[-1])
                stock = _best(catalog.stock.get(("serverless", gpu.id)) for gpu in types)
                return Price(usd, pool, count, catalog.sources["serverless"], stock)
        return None

    def card(self, card: str) -> Price | None:
        """A pod with the card of config/models.yaml, `A100 80GB` or `2x A100 80GB`; None: its price is not known.

        Low is the cheapest offer, community cloud included; expected and high are the cheapest and the dearest in secure
        cloud. Where RunPod has no such card with just this memory, it is the one with the next more.
        """
        match = re.fullmatch(r"(?:(\d+) ?x )?(.+?) (\d+) ?GB", card)
        if not match:
            return None
        count, memory = int(match[1] or 1), int(match[3])
        name = re.compile(rf"(?<![A-Za-z0-9]){re.escape(match[2])}(?![A-Za-z0-9])", re.I)
        for catalog in self.catalogs:
            fitting = [gpu for gpu in catalog.gpus if name.search(gpu.id) and gpu.memory >= memory and gpu.secure]
            if not fitting:
                continue
            least = min(gpu.memory for gpu in fitting)
            note = "" if least == memory else f"RunPod has no {match[2]} {memory}GB: priced as the one of {least} GB"
            return _pods([gpu for gpu in fitting if gpu.memory == least], count, catalog, note)
        return None

    def machine(self, machine: str) -> Price | None:
        """A pod that is the machine of an ablation, `2 x NVIDIA A100 80GB PCIe`: GPU types are called so at RunPod, too."""
        match = re.fullmatch(r"(\d+) x ([^,]+)", machine)
        if not match:
            return None
        for catalog in self.catalogs:
            types = [gpu for gpu in catalog.gpus if gpu.id.lower() == match[2].strip().lower() and gpu.secure]
            if types:
                return _pods(types, int(match[1]), catalog, "")
        return None


def _pods(types: Sequence[Gpu], count: int, catalog: Catalog, note: str) -> Price:
    by_price = sorted(types, key=lambda gpu: gpu.secure or 0.0)
    secure = [gpu.secure or 0.0 for gpu in by_price]
    low = min([*secure, *(gpu.community for gpu in types if gpu.community)])
    usd = Range(count * low, count * secure[0], count * secure[-1])
    stock = _best(catalog.stock.get(("pod", gpu.id)) for gpu in types)
    return Price(usd, by_price[0].id, count, catalog.sources["pod"], stock, note)


def _best(levels: Any) -> str | None:
    order = ("NONE", "LOW", "MEDIUM", "HIGH")
    found = [level for level in levels if level in order]
    return max(found, key=order.index) if found else None


# --- from RunPod -------------------------------------------------------------------------------------------------------


def live(api: Any, now: datetime | None = None) -> Catalog:
    """The catalog of an account's RunPod. Raises ApiError."""
    gpus: dict[str, Gpu] = {}
    stock: dict[tuple[Product, str], str] = {}
    for product in PRODUCTS:
        answer = api.get("catalog/gpus", {"include": "AVAILABILITY", "product": product.upper()}, budget=_BUDGET)
        listed = answer.get("gpus")
        for item in listed if isinstance(listed, list) else []:
            gpu = _gpu(item)
            if gpu:
                gpus[gpu.id] = gpu
                if isinstance(item.get("availability"), str):
                    stock[product, gpu.id] = item["availability"]
    if not gpus:
        raise ApiError("GET /catalog/gpus: the answer holds no GPU")
    local = is_near(urlsplit(api.url).hostname or "")
    name = "the local RunPod's catalog, made for practice" if local else "RunPod's catalog"
    source = Source(name, (now or datetime.now(UTC)).date().isoformat())
    return Catalog(tuple(gpus.values()), dict.fromkeys(PRODUCTS, source), stock)


def _gpu(item: Any) -> Gpu | None:
    """A type of the live catalog; None where it is not what it should be: others may be."""
    if not isinstance(item, dict) or not isinstance(item.get("id"), str):
        return None
    memory, price, pool = item.get("memory"), item.get("price"), item.get("pool")
    if isinstance(memory, bool) or not isinstance(memory, int) or not isinstance(price, dict):
        return None
    return Gpu(
        id=item["id"],
        name=str(item.get("name") or item["id"]),
        pool=pool if isinstance(pool, str) else None,
        memory=memory,
        serverless=_usd(price.get("serverless")),
        # A cloud that does not offer a type may name a price for it all the same.
        secure=_usd(price.get("secure")) if item.get("secure") is not False else None,
        community=_usd(price.get("community")) if item.get("community") is not False else None,
    )


def _usd(value: Any) -> float | None:
    """A price; 0 and what is no number are none. Prices come as 32-bit floats: 1.1900000572 is 1.19."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 10_000:
        return None
    return round(float(value), 4)


# --- from config/prices.yaml -------------------------------------------------------------------------------------------


def table(path: Path | None = None) -> Catalog:
    """config/prices.yaml. Raises Problem with file, line and key."""
    path = path or Path(os.environ.get("CONFIG_DIR") or "config") / "prices.yaml"
    file = yaml_file.read(path)
    data = _block(file, (), file.data, required=("sources", "gpus"))
    told = _block(file, ("sources",), data["sources"], required=PRODUCTS)
    sources: dict[Product, Source] = {}
    for product in PRODUCTS:
        where: yaml_file.Where = ("sources", product)
        block = _block(file, where, told[product], required=("from", "date"))
        if (
            not isinstance(block["from"], str)
            or not isinstance(block["date"], str)
            or not _DATE.fullmatch(block["date"])
        ):
            raise Problem(f'{file.at(where)}: sources.{product} needs a text `from` and a date like "2026-06-08"')
        sources[product] = Source(f"{path}: {block['from']}", block["date"])
    if not isinstance(data["gpus"], list) or not data["gpus"]:
        raise Problem(f"{file.at(('gpus',))}: gpus must list GPU types")
    gpus = [_table_gpu(file, index, item) for index, item in enumerate(data["gpus"])]
    if twice := [gpu.id for index, gpu in enumerate(gpus) if gpu.id in {other.id for other in gpus[:index]}]:
        raise Problem(f"{path}: {twice[0]} stands there twice")
    return Catalog(tuple(gpus), sources, {})


def _table_gpu(file: yaml_file.YamlFile, index: int, item: Any) -> Gpu:
    where: yaml_file.Where = ("gpus", index)
    prices = ("serverless", "secure", "community")
    block = _block(file, where, item, required=("id", "pool", "memory"), optional=prices)
    if not isinstance(block["id"], str) or not isinstance(block["pool"], str):
        raise Problem(f"{file.at(where)}: id and pool must be texts")
    if isinstance(block["memory"], bool) or not isinstance(block["memory"], int) or not 1 <= block["memory"] <= 10_000:
        raise Problem(f"{file.at(where)}: {block['id']}: memory must be whole GB, not {block['memory']!r:.40}")
    for key in prices:
        if key in block and _usd(block[key]) is None:
            raise Problem(
                f"{file.at((*where, key))}: {block['id']}: {key} must be US dollars per hour, not {block[key]!r:.40}"
            )
    return Gpu(
        block["id"], block["id"], block["pool"], block["memory"], **{key: _usd(block.get(key)) for key in prices}
    )


def _block(
    file: yaml_file.YamlFile,
    where: yaml_file.Where,
    block: Any,
    *,
    required: Sequence[str],
    optional: Sequence[str] = (),
) -> dict[str, Any]:
    if not isinstance(block, dict):
        raise Problem(f"{file.at(where)}: here must stand the keys {', '.join(required)}")
    for kind, wrong in (
        ("unknown", [str(key) for key in block if key not in (*required, *optional)]),
        ("missing", [key for key in required if key not in block]),
    ):
        if wrong:
            raise Problem(
                f"{file.at((*where, wrong[0]))}: {kind} key {', '.join(wrong)[:200]}; known are {', '.join((*required, *optional))}"
            )
    return block
