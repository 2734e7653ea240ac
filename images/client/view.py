"""A checked synthesis for reading in a terminal: the text with flags in its margin, the references, then a table."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import bundle
import evidence
from checks import UNREVIEWED, Result
from common.files import to_json
from common.text import clean
from margin import margin

WIDE = 1_000_000  # where nobody reads it on a terminal, lines are not wrapped
SHOWN_FLAGS = 40


def on_terminal() -> bool:
    """Does a person see stdout? A container's is a pipe even when a terminal shows it; scripts/run says so."""
    return sys.stdout.isatty() or bool(os.environ.get("STDOUT_IS_TERMINAL"))


def printed(
    form: str,
    run: dict[str, Any],
    manifest: Sequence[dict[str, Any]],
    result: Result,
    notes: Sequence[str],
    end: str,
    **seconds: float | None,
) -> str:
    """A run as it is printed: `run` holds folder, question, domain and text; `end` is the last line of the text form."""
    if form == "json":
        told = {key: run[key] for key in ("question", "domain", "text")}
        return to_json({"run": str(run["folder"]), **told, **result.as_json()}).rstrip()
    shown = page(run["question"], run["domain"], run["text"], manifest, result, notes)
    return f"{shown}\n\n{table(result, **seconds)}\n\n{end}"


def page(
    question: str, domain: str, text: str, manifest: Sequence[dict[str, Any]], result: Result, notes: Sequence[str]
) -> str:
    """The text with its flags, and the references of what it cites."""
    terminal = on_terminal()
    width = min(shutil.get_terminal_size().columns, 120) if terminal else WIDE
    colour = terminal and not os.environ.get("NO_COLOR")
    shown = [flag for flag in result.flags if flag in result.real or flag in result.unchecked]
    body = margin(text, result.claims, shown, width, colour).rstrip()
    cited = {source for claim in result.claims for source in claim.cited}
    return bundle.page(question, domain, body, manifest, cited, notes)


def table(result: Result, seconds: float | None = None, execution_seconds: float | None = None) -> str:
    """What was found, in figures, each flag with its sentence's id, and what was not looked at."""
    found = result.summary()
    kinds = ", ".join(f"{kind} {count}" for kind, count in found["flags"].items())
    ran = [f"level {level['level']} {level['name']}" for level in result.levels if level["state"] == "ran"]
    off = [
        f"level {level['level']} {level['name']} ({level['why']})" for level in result.levels if level["state"] != "ran"
    ]
    highest = next((level for level in reversed(result.levels[:3]) if level["state"] == "ran"), None)
    rows = [
        ("claims", f"{found['claims']}, {found['facts']} of them about the world"),
        ("cited", f"{found['cited']} of {found['facts']}"),
        ("grounded", f"{found['grounded']} of {found['facts']}" if result.levels[1]["state"] == "ran" else "off"),
        ("flagged", f"{found['flagged']}{f': {kinds}' if kinds else ''}"),
        ("confidence", f"{result.overall.label}: {result.overall.reason}" if result.overall else "off"),
        ("checks", ", ".join(ran) or "none"),
        *([("off", ", ".join(off))] if off else []),
        *([("cannot see", f"{highest['cannot_see']} (measured: docs/checks-power.md)")] if highest else []),
        *([("unchecked", f"{found['unchecked']}")] if found["unchecked"] else []),
        *([("agreement", _agreement(result.agreement))] if result.agreement else []),
        *([("review", UNREVIEWED)] if result.review.get("required") else []),
        *([("time", f"{seconds:.1f} s")] if seconds is not None else []),
        *(
            [("cost", f"{execution_seconds:.1f} s of the worker; in money: make costs")]
            if execution_seconds is not None
            else []
        ),
    ]
    lines = [f"{name.ljust(11)} {value}" for name, value in rows]
    told = [*result.real, *result.unchecked]
    for flag in told[:SHOWN_FLAGS]:
        lines.append(f"{(flag.claim or '-').ljust(11)} {flag.kind}: {flag.detail}")
    if len(told) > SHOWN_FLAGS:
        lines.append(f"{'-'.ljust(11)} and {len(told) - SHOWN_FLAGS} more, in claims.json")
    if result.overall:
        for claim in result.claims:
            if claim.id in {key["id"] for key in result.overall.key_claims}:
                lines += evidence.explain(claim)
    return clean("\n".join(lines))


def _agreement(found: dict[str, dict[str, Any]]) -> str:
    """In how many of the further answers the claims are found again."""
    shares = {name: each["share"] for name, each in found.items() if each["share"] is not None}
    if not shares:
        return "no claim to compare"
    alone = [name for name, share in shares.items() if share == 0]
    average = sum(shares.values()) / len(shares)
    return f"{average:.0%} on average{f'; in none of the others: {chr(44).join(alone)}' if alone else ''}"


def markdown(result: Result) -> str:
    """The same for synthesis.md: what was checked, flagged and left out, and by which rule, so that it can stand alone."""
    lines = table(result)
    if result.overall:
        lines += "\n\n" + clean("\n".join(["The rule of confidence, with this run's numbers:", *result.overall.rule]))
    return "## Checks\n\n```text\n" + lines.replace("```", "'''") + "\n```\n"
