"""Records: the documents of a corpus, one JSON object per line. Reading them is strict, so that nothing is guessed."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from common.problems import Problem
from common.text import clean

SOURCE_TYPES = (
    "systematic_review", "meta_analysis", "rct", "quasi_experimental", "cohort", "case_control", "cross_sectional",
    "case_series", "qualitative", "animal", "in_vitro", "simulation", "registry", "statistics", "guideline",
    "narrative_review", "book", "policy", "news", "other",
)  # fmt: skip
REPLICATION_STATUSES = ("successful", "mixed", "failed", "not_attempted", "unknown")
INTEGRITY_STATUSES = ("none", "corrected", "expression_of_concern", "retracted", "reinstated", "unchecked")
_VOCABULARIES = {
    "source_type": SOURCE_TYPES,
    "replication_status": REPLICATION_STATUSES,
    "integrity_status": INTEGRITY_STATUSES,
}
MAX_LINE_BYTES = 10_000_000
_SHOWN_PROBLEMS = 10


@dataclass(frozen=True)
class Record:
    """One document. `text` is kept as it was read; `doi` is bare (10.…), without a resolver in front."""

    id: str
    title: str
    text: str
    authors: list[str] = field(default_factory=list)
    year: int | None = None
    doi: str | None = None
    venue: str | None = None
    url: str | None = None
    source_type: str = "other"
    replication_status: str = "unknown"
    integrity_status: str = "unchecked"
    provider: str | None = None
    license: str | None = None

    def fingerprint(self) -> str:
        """A short hash of everything in the record."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def metadata(self) -> dict[str, Any]:
        """Everything but the text, as it may be shown: cleaned, each value on one line."""
        return {key: _shown(value) for key, value in asdict(self).items() if key != "text"}


def _shown(value: Any) -> Any:
    if isinstance(value, list):
        return [_shown(item) for item in value]
    # A line break in a title could forge a line of the reference list.
    return " ".join(clean(value).split()) if isinstance(value, str) else value


def label(metadata: dict[str, Any]) -> str:
    """What the model is told of a document: "Klein et al. (2018) · rct · replication: successful".

    Its integrity stands there where something is known against it: "… · integrity: retracted".
    """
    parts = [short_label(metadata), metadata["source_type"], f"replication: {metadata['replication_status']}"]
    if metadata["integrity_status"] not in ("none", "unchecked"):
        parts.append(f"integrity: {metadata['integrity_status']}")
    return " · ".join([parts[0], *(part.replace("_", " ") for part in parts[1:])])


def short_label(metadata: dict[str, Any]) -> str:
    """A short name for a document: "Klein et al. (2018)"."""
    families = [str(author).split(",")[0].strip() for author in metadata["authors"]]
    if not families:
        names = metadata["title"]
    elif len(families) == 1:
        names = families[0]
    elif len(families) == 2 and families[1] != "et al.":
        names = f"{families[0]} and {families[1]}"
    else:
        names = f"{families[0]} et al."
    return f"{names} ({metadata['year'] or 'n.d.'})"


def reference(metadata: dict[str, Any]) -> str:
    """The reference of a document, rendered from its metadata and from nothing else."""
    authors = "; ".join(metadata["authors"]) or "Unknown author"
    title = metadata["title"]
    title = title if title.endswith(("?", "!")) else f"{title.rstrip('.')}."
    parts = [f"{authors} ({metadata['year'] or 'n.d.'}). {title}"]
    if metadata["venue"]:
        parts.append(f"{metadata['venue']}.")
    if metadata["doi"]:
        parts.append(f"https://doi.org/{metadata['doi']}")
    elif metadata["url"]:
        parts.append(metadata["url"])
    notes = [
        metadata["source_type"].replace("_", " "),
        f"replication: {metadata['replication_status'].replace('_', ' ')}",
    ]
    if metadata["integrity_status"] not in ("none", "unchecked"):
        notes.append(metadata["integrity_status"].replace("_", " ").upper())
    return clean(f"{' '.join(parts)} ({'; '.join(notes)})")


def read(path: Path) -> list[Record]:
    """All records of a JSONL file. Raises Problem that names each bad line; then nothing has been read."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise Problem(f"{path} does not exist. Try: make ingest DOMAIN=my-field FROM=records.jsonl") from None
    except IsADirectoryError:
        raise Problem(f"{path} is a folder; give a JSONL file, one record per line") from None
    except OSError as error:
        raise Problem(f"{path} cannot be read: {error.strerror}") from error
    records: list[Record] = []
    lines_of: dict[str, int] = {}
    problems: list[str] = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = parse(line)
            if record.id in lines_of:
                raise ValueError(f"id {record.id} is on line {lines_of[record.id]} already")
            lines_of[record.id] = number
            records.append(record)
        except ValueError as error:
            problems.append(f"{path}:{number}: {_shown(str(error))}")
    if problems:
        more = len(problems) - _SHOWN_PROBLEMS
        shown = "\n  ".join(problems[:_SHOWN_PROBLEMS]) + (f"\n  and {more} more" if more > 0 else "")
        raise Problem(f"nothing was ingested; {len(problems)} bad record(s):\n  {shown}")
    if not records:
        raise Problem(f"{path} holds no records; it should have one JSON object per line")
    return records


def parse(line: bytes) -> Record:
    """One record from one line. Raises ValueError that says what is wrong."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the line has {len(line)} bytes, {MAX_LINE_BYTES} are allowed; split the document")
    try:
        data = json.loads(line.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not a record: nested too deeply") from None
    if not isinstance(data, dict):
        raise ValueError("not a record: expected one JSON object per line")
    known = Record.__dataclass_fields__
    if unknown := [key for key in data if key not in known]:
        raise ValueError(f"unknown key {', '.join(unknown)}; the keys are {', '.join(known)}")
    data = {key: value for key, value in data.items() if value is not None}
    for key in ("id", "title", "text"):
        if not isinstance(data.get(key), str) or not clean(data[key]).strip():
            raise ValueError(f"{key} is missing, empty or not text")
    if len(data["id"]) > 200 or re.search(r"\s", data["id"]) or data["id"] != clean(data["id"]):
        raise ValueError("id must be at most 200 visible characters without spaces")
    for key in ("doi", "venue", "url", "provider", "license", *_VOCABULARIES):
        if not isinstance(data.get(key, ""), str):
            raise ValueError(f"{key} must be text")
    authors = data.get("authors", [])
    if not isinstance(authors, list) or not all(isinstance(name, str) and clean(name).strip() for name in authors):
        raise ValueError("authors must be a list of names")
    year = data.get("year")
    if year is not None and (isinstance(year, bool) or not isinstance(year, int) or not 1000 <= year <= 2100):
        raise ValueError(f"year must be a whole number from 1000 to 2100, not {year!r:.40}")
    for key, words in _VOCABULARIES.items():
        if key in data and data[key] not in words:
            raise ValueError(f"{key} {data[key]!r:.40} is unknown; known are {', '.join(words)}")
    if "doi" in data:
        data["doi"] = re.sub(r"^(?:https?://(?:dx\.)?doi\.org/|doi:\s*)", "", data["doi"].strip(), flags=re.I)
        if not re.fullmatch(r"10\.\d{4,9}/\S+", data["doi"]):
            raise ValueError(f"doi {data['doi']!r:.80} does not look like 10.1234/abc")
    if "url" in data and not re.fullmatch(r"https?://\S+", data["url"]):
        raise ValueError(f"url {data['url']!r:.80} does not start with http:// or https://")
    try:
        json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a surrogate pair (\\ud800 to \\udfff), which is not text") from None
    return Record(**data)


def _no_constant(name: str) -> Any:
    raise ValueError(f"not JSON: {name} is not a number JSON knows")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)} is there twice")
    return data
