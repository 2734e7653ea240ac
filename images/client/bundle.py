"""The run bundle: everything that is needed to read, check and replay a run, in one folder that is never overwritten.

    runs/<utc>-<slug>-<hash8>/
      run.json         question, domain, configuration, prompt hashes, corpus hash, model, timings, cost, states, flags
      sources.json     the manifest: S1…Sn with chunk, document, text, metadata, ranks and scores
      synthesis.md     the text and the reference list
      claims.json      the claim ledger: each sentence with the sources it cites
      output.json      what the worker answered, untouched

A run that has not ended lies in a hidden folder beside the others; its run.json holds the job's id.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from common.files import to_json, write_atomic
from common.problems import Problem
from common.text import clean, slug
from records import reference


class Bundle:
    """One run's folder under RUNS_DIR, hidden until `finish`."""

    def __init__(self, question: str, domain: str) -> None:
        root = Path(os.environ.get("RUNS_DIR") or "runs")
        utc = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        digest = hashlib.sha256(f"{question}\0{domain}\0{uuid.uuid4()}".encode()).hexdigest()[:8]
        self.folder = root / f"{utc}-{slug(question)}-{digest}"
        self._hidden = root / f".{self.folder.name}"
        self.run: dict[str, Any] = {}
        self.shown = False
        try:
            self._hidden.mkdir(parents=True)
        except OSError as error:
            raise Problem(f"{root} cannot be written: {error.strerror}; set RUNS_DIR to a folder you own") from error

    def write(self, name: str, content: object) -> None:
        """Write one file of the bundle: text as it is, anything else as JSON."""
        write_atomic(self._hidden / name, content if isinstance(content, str) else to_json(content))

    def note(self, **facts: Any) -> None:
        """Add facts to run.json."""
        self.run.update(facts)
        self.write("run.json", self.run)

    def discard(self) -> None:
        """Leave nothing behind: no job was sent."""
        shutil.rmtree(self._hidden, ignore_errors=True)

    def finish(self) -> Path:
        """Show the folder under its name."""
        self._hidden.rename(self.folder)
        self.shown = True
        return self.folder


def markdown(
    question: str,
    domain: str,
    text: str,
    manifest: Sequence[dict[str, Any]],
    cited: Collection[str],
    notes: Sequence[str],
) -> str:
    """The synthesis as a page: nothing of a record becomes a link, an image or a tag in it."""
    return page(question, domain, clean(text).strip(), manifest, cited, notes, plain) + "\n"


def page(
    question: str,
    domain: str,
    body: str,
    manifest: Sequence[dict[str, Any]],
    cited: Collection[str],
    notes: Sequence[str],
    shown: Callable[[str], str] = clean,
) -> str:
    """Question, notes, text, and the references of what it cites, from the metadata. `body` is fit to be shown already;
    what comes from records goes through `shown`."""
    quoted = "\n".join(f"> {line}".rstrip() for line in clean(question).split("\n"))
    parts = [quoted, *(f"*{note}*" for note in notes), body]
    listed = [f"- [{entry['id']}] {shown(reference(entry['metadata']))}" for entry in manifest if entry["id"] in cited]
    if listed:
        parts.append("## References (from the records)\n\n" + "\n".join(listed))
    unused = len(manifest) - len(listed)
    parts.append(f"{len(manifest)} sources retrieved from {shown(clean(domain))}, {unused} of them not cited.")
    return "\n\n".join(parts)


def plain(text: str) -> str:
    """Text of a record as it stands in Markdown: nothing in it becomes a link, an image or a tag."""
    return re.sub(r"([\\`*\[\]<>])", r"\\\1", text)
