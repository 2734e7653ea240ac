"""The claim ledger: each sentence of a synthesis as data, with all that was found out about it.

`Claim` and `Flag` are what the checks fill; claims.json holds them. Nothing here judges: see citation_check, grounding,
entailment and evidence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

# fact: says something about the world, and needs a source. hedge: says that something is not known or not certain.
# method: says how a study was done. meta: speaks of this text or of the sources as a whole, not of the world.
Kind = Literal["fact", "hedge", "method", "meta"]


@dataclass
class Flag:
    """Something that a reader must know. `check` found it, `kind` names it, `detail` is a sentence that may be shown."""

    check: Literal["citation", "grounding", "entailment", "judge", "evidence"]
    kind: str
    detail: str
    claim: str | None = None  # a claim's id
    source: str | None = None  # a source's id


@dataclass
class Claim:
    """One sentence. `span` are its offsets in the synthesis: `synthesis[start:end] == text`.

    `bare` is the sentence without citations, list markers and emphasis: what is compared with sources.
    """

    id: str  # C1…Cn
    text: str
    bare: str
    span: tuple[int, int]
    section: str  # the heading above it, empty before the first
    kind: Kind
    cited: list[str] = field(default_factory=list)  # ids that exist, in order
    unknown: list[str] = field(default_factory=list)  # ids that were never retrieved
    malformed: list[str] = field(default_factory=list)  # brackets that look like citations, as written
    # Filled by the checks: by check's name what it found, by source's id where it looked at sources.
    checks: dict[str, Any] = field(default_factory=dict)
    status: str = "unchecked"
    confidence: dict[str, Any] | None = None
