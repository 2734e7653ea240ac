"""Does each domain of the store open, and were its vectors made by the embedding model that is configured?

python -m store_check      for make doctor: records for scripts/doctor on standard output, one a line, tab-separated

A damaged index can end the process without a word. So a domain is announced before it is opened, `end` is the last line,
and who reads this knows which domain it was. Nothing is written but what every question writes (a lock file, the index's
own files), and no model is loaded.
"""

from __future__ import annotations

import re

import settings
import store
from common.problems import OK, TRY_LATER, Problem, run
from embedding import is_shipped


def check(name: str, model: str) -> tuple[str, str, str]:
    """State, what was found, and what mends it, for one domain."""
    domain = store.Domain(name)
    again = f'make retrieve Q="…" DOMAIN={name}'
    try:
        with domain.reading():
            index = domain.state().get("index")
            if not isinstance(index, dict) or not domain.index_folder.is_dir():
                return "note", "is not indexed; its next question builds the index", again
            if not _same_model(str(index.get("embedding_model", "")), model):
                words = (
                    "was embedded by another model than config/inference.yaml names; its next question builds it anew"
                )
                return "note", words, again
            if index != store.index_state(str(index.get("embedding_model")), domain.corpus_hash()) or (
                not domain.lexical_folder.is_dir()
            ):
                return "note", "has an index behind its records; its next question brings it up to date", again
            size = domain.probe()
    except Problem as problem:
        if problem.code == TRY_LATER:
            return "unknown", "is in use by another process", "make doctor, when that is done"
        lexical = str(domain.lexical_folder) in str(problem)
        folder = domain.lexical_folder if lexical else domain.index_folder
        return "problem", "has an index that cannot be read", f"rm -r {folder}, then {again}"
    except (OSError, ValueError) as error:
        return (
            "problem",
            f"has records that cannot be read ({type(error).__name__})",
            f"make ingest DOMAIN={name} FROM=…",
        )
    return "ok", f"opens, {size} chunks of the model that is configured", ""


def _same_model(made_by: str, model: str) -> bool:
    """Is the name that an index holds that of the configured model? Models of the hub carry their commit in it."""
    if is_shipped(model):
        return made_by == settings.SHIPPED_MODEL
    return made_by.rpartition("@")[0] == model or made_by == model


def main() -> int:
    """Print a record for each domain that is in the store."""
    model = settings.load().embedding_model
    for path in sorted(store.root().glob("*/records.jsonl")):
        name = path.parent.name
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
            print("line\tnote\tstore\thas a folder that is no domain\t", flush=True)
            continue
        print(f"begin\t{name}", flush=True)
        state, found, mend = check(name, model)
        print(f"line\t{state}\tstore\tdomain {name} {found}\t{mend}", flush=True)
    print("end", flush=True)
    return OK


if __name__ == "__main__":
    run(main)
