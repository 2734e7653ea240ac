"""What a run is configured with: config/inference.yaml (reviewed in git) and the environment (.env, the shell).

Each value has one home, and a missing, unknown or out-of-range one is an error that names the file and the key.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import strict
from common.problems import Problem
from common.text import clean, slug
from common.urls import base_url

SHIPPED_MODEL = "all-MiniLM-L6-v2"
RUNPOD_JOBS_URL = "https://api.runpod.ai/v2"
MAX_QUESTION_CHARS = 10_000
RERANKER = "cross-encoder/ms-marco-MiniLM-L6-v2"
QUESTION = "{question}"  # the place of the question in a rewording
MAX_WORDINGS = 8

# key: (type, lowest, highest) of config/inference.yaml.
_NUMBERS: dict[str, strict.Spec] = {
    "temperature": (float, 0, 2),
    "top_p": (float, 0.01, 1),
    "repetition_penalty": (float, 0.5, 2),
    "max_new_tokens": (int, 1, 32768),
    "n_results": (int, 1, 200),
    "min_similarity": (float, -1, 1),
    "lexical_coverage": (float, 0, 1),
    "rare_share": (float, 0, 1),
    "lexical_weight": (float, 0, 1),
    "refuting_weight": (float, 0, 1),
    "refuting_relevance": (float, 0, 1),
    "mmr_lambda": (float, 0, 1),
    "max_per_paper": (int, 1, 200),
    "source_tokens": (int, 100, 1_000_000),
    "tokens_per_piece": (float, 0.1, 10),
    "samples": (int, 1, 20),
    "queue_timeout": (int, 1, 86_400),
    "execution_timeout": (int, 5, 604_800),
}

_SWITCHES = (
    "datamark",
    "lexical",
    "citation_check_enabled",
    "hallucination_check_enabled",
    "uncertainty_quantification",
    "human_review_required",
)


@dataclass(frozen=True)
class Settings:
    """config/inference.yaml. Timeouts in seconds."""

    temperature: float
    top_p: float
    repetition_penalty: float
    max_new_tokens: int
    seed: int | None
    datamark: bool
    n_results: int
    min_similarity: float
    embedding_model: str
    lexical: bool
    lexical_coverage: float
    rare_share: float
    lexical_weight: float
    refuting: list[str]
    refuting_weight: float
    refuting_relevance: float
    rerank: str | None
    mmr_lambda: float
    max_per_paper: int
    source_tokens: int
    source_tokenizer: str | None
    tokens_per_piece: float
    citation_check_enabled: bool
    hallucination_check_enabled: bool
    uncertainty_quantification: bool
    human_review_required: bool
    samples: int
    queue_timeout: int
    execution_timeout: int

    def sampling(self) -> dict[str, Any]:
        """What goes to the worker with each job."""
        keys = ("temperature", "top_p", "repetition_penalty", "max_new_tokens", "seed")
        marked = {"datamark": True} if self.datamark else {}
        return {**{key: value for key, value in asdict(self).items() if key in keys}, **marked}


@dataclass(frozen=True)
class Endpoint:
    """Where jobs go. `url` has no trailing slash; `key` is a secret and is never printed."""

    url: str
    id: str
    key: str

    def __repr__(self) -> str:
        return f"Endpoint({self.url}/{self.id})"


def load(path: Path | None = None) -> Settings:
    """Read and check the configuration. Raises Problem with the file and the key."""
    path = path or Path(os.environ.get("CONFIG_DIR") or "config") / "inference.yaml"
    data = strict.read(path)
    strict.check_keys(str(path), data, Settings.__dataclass_fields__)
    for key, spec in {**_NUMBERS, **dict.fromkeys(_SWITCHES, bool)}.items():
        strict.check_value(f"{path}: {key}", data[key], spec)
    seed = data["seed"]
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63):
        raise Problem(f"{path}: seed must be null or a whole number from 0 to 2^63 - 1, not {seed!r}")
    if not isinstance(data["embedding_model"], str) or not data["embedding_model"].strip():
        raise Problem(f"{path}: embedding_model must be a model id, for example {SHIPPED_MODEL}")
    for key, example in (("rerank", RERANKER), ("source_tokenizer", "config/tokenizer.json")):
        if data[key] is not None and (not isinstance(data[key], str) or not data[key].strip()):
            raise Problem(f"{path}: {key} must be null or a text, for example {example}, not {data[key]!r:.100}")
    wordings = data["refuting"]
    if (
        not isinstance(wordings, list)
        or len(wordings) > MAX_WORDINGS
        or not all(isinstance(wording, str) and wording.count(QUESTION) == 1 for wording in wordings)
    ):
        raise Problem(
            f"{path}: refuting must be a list of at most {MAX_WORDINGS} texts, {QUESTION} once in each, not {wordings!r:.200}"
        )
    return Settings(**data)


def variable(name: str) -> str:
    """An environment variable; an empty one counts as not set."""
    return os.environ.get(name, "")


def form() -> str:
    """How results are printed: AS=text, the default, or AS=json."""
    given = variable("AS") or "text"
    if given not in ("text", "json"):
        raise Problem(f"AS={given!r:.40} is unknown; known are text and json")
    return given


def question() -> str:
    """The question of Q, byte for byte."""
    text = variable("Q")
    if not clean(text).strip():
        raise Problem('Q is empty. Try: make synth Q="Does ego depletion replicate?" DOMAIN=psychology')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Problem("Q is not valid UTF-8; check the terminal's encoding (locale)") from None
    if len(text) > MAX_QUESTION_CHARS:
        raise Problem(
            f"Q has {len(text)} characters, {MAX_QUESTION_CHARS} are allowed; put documents into the corpus: make ingest"
        )
    return text


def domain() -> str:
    """The domain of DOMAIN: a name that is safe as a folder."""
    name = variable("DOMAIN")
    if not name.strip():
        raise Problem("DOMAIN is empty. Try: DOMAIN=psychology")
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,62}", name):
        raise Problem(
            f"DOMAIN={name!r:.80} is not a domain name: lower-case letters, digits, - and _ only, 63 at most."
            f" Try: DOMAIN={slug(name)}"
        )
    return name


def endpoint() -> Endpoint:
    """Where jobs go, from RUNPOD_ENDPOINT_ID, RUNPOD_API_KEY and RUNPOD_JOBS_URL."""
    endpoint_id, key = variable("RUNPOD_ENDPOINT_ID"), variable("RUNPOD_API_KEY")
    for name, value, other in (
        ("RUNPOD_ENDPOINT_ID", endpoint_id, "RUNPOD_API_KEY"),
        ("RUNPOD_API_KEY", key, "RUNPOD_ENDPOINT_ID"),
    ):
        if not value:
            raise Problem(f"{name} is not set. Set it beside {other} in .env, or unset both to use the local RunPod")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", endpoint_id):
        raise Problem(f"RUNPOD_ENDPOINT_ID={endpoint_id!r:.80} is not an endpoint id; the RunPod console shows it")
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        raise Problem(
            "RUNPOD_API_KEY has a space or a character that no key has; copy it again from the RunPod console"
        )
    return Endpoint(base_url("RUNPOD_JOBS_URL", RUNPOD_JOBS_URL), endpoint_id, key)
