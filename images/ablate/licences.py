# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the licence of a base model asks of a changed copy of it: its name, its files, and whether it may be public.

Only licences that were read are in the table; any other, or none, means that the copy stays private. Not legal advice.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import manifest
from common.problems import Problem
from common.text import clean

# The Hub's limit for the part of a repository's id behind the slash.
MAX_NAME = 96
# The ids that the Hub takes as `license` (https://huggingface.co/docs/hub/repositories-licenses). A card with any other is
# refused at its commit; such a licence is `other` with a name.
HUB_IDS = frozenset(
    "afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd"
    " bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0"
    " cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0"
    " cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0"
    " creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0"
    " isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl"
    " odc-by ofl-1.1 openrail openrail++ osl-3.0 other pddl postgresql unknown unlicense wtfpl zlib".split()
)
_LICENCE_FILE = re.compile(r"(?:licen[cs]e|notice|use[-_ ]policy)(?:[-_. ].*)?", re.IGNORECASE)
_LINK = re.compile(r"https?://[\w.~:/?#@!$&*+,;=%-]{1,500}|LICENSE(?:\.md)?", re.ASCII)


@dataclass(frozen=True)
class Licence:
    """One licence. `id` is the Hub's, "" when the base model names none.

    `public`: may a changed copy be given to everyone? `prefix`: what the copy's name must begin with. `notice`: the
    sentence that the model card shows. `notice_file`: the content of a file NOTICE that goes along.
    """

    id: str
    public: bool
    prefix: str = ""
    notice: str = ""
    notice_file: str = ""


def _llama(version: str) -> Licence:
    # https://github.com/meta-llama/llama-models/blob/main/models/llama3_3/LICENSE, sections 1.b.i and 1.b.iii; the
    # agreements of 3.1, 3.2 and 4 say the same with their own number.
    return Licence(
        id=f"llama{version}",
        public=True,
        prefix="Llama",
        notice="Built with Llama",
        notice_file=f"Llama {version} is licensed under the Llama {version} Community License,"
        " Copyright © Meta Platforms, Inc. All Rights Reserved.",
    )


_TABLE = {
    licence.id: licence
    for licence in (
        # https://www.apache.org/licenses/LICENSE-2.0, section 4: copy of the licence, NOTICE, statement of changes.
        Licence("apache-2.0", public=True),
        # https://opensource.org/license/mit: copyright notice and permission notice go along.
        Licence("mit", public=True),
        # https://opensource.org/license/bsd-2-clause and https://opensource.org/license/bsd-3-clause
        Licence("bsd-2-clause", public=True),
        Licence("bsd-3-clause", public=True),
        # https://github.com/meta-llama/llama/blob/main/LICENSE, section 1.b: no rule for the name.
        Licence(
            "llama2",
            public=True,
            notice_file="Llama 2 is licensed under the LLAMA 2 Community License,"
            " Copyright (c) Meta Platforms, Inc. All Rights Reserved.",
        ),
        # https://github.com/meta-llama/llama3/blob/main/LICENSE, section 1.b: the name begins with "Llama 3"; a
        # repository's name has no spaces.
        Licence(
            "llama3",
            public=True,
            prefix="Llama-3",
            notice="Built with Meta Llama 3",
            notice_file="Meta Llama 3 is licensed under the Meta Llama 3 Community License,"
            " Copyright © Meta Platforms, Inc. All Rights Reserved.",
        ),
        *(_llama(version) for version in ("3.1", "3.2", "3.3", "4")),
        # https://ai.google.dev/gemma/terms, section 3.1: the terms, the sentence and a note of changes go along.
        Licence(
            "gemma",
            public=True,
            notice_file="Gemma is provided under and subject to the Gemma Terms of Use found at"
            " ai.google.dev/gemma/terms",
        ),
        # https://huggingface.co/Qwen/Qwen2.5-72B-Instruct/blob/main/LICENSE, section 3: copy, notice, note of changes.
        # (Qwen3 is apache-2.0; qwen-research allows no commercial use and is left out on purpose.)
        Licence(
            "qwen",
            public=True,
            notice_file="Qwen is licensed under the Qwen LICENSE AGREEMENT,"
            " Copyright (c) Alibaba Cloud. All Rights Reserved.",
        ),
    )
}
# Other spellings of the same licences on model cards.
_ALIASES = {"tongyi-qianwen": "qwen", "llama-3.1": "llama3.1", "llama-3.2": "llama3.2", "llama-3.3": "llama3.3"}


def declared(card: Mapping[str, Any]) -> str | None:
    """The licence that a model card's metadata names, in lower case; None where it names none.

    The Hub writes `license: other` beside `license_name` for licences that it has no id for.
    """
    licence, name = (_word(card, key).lower() for key in ("license", "license_name"))
    return (name if licence in ("", "other") else licence) or licence or None


def declared_name(card: Mapping[str, Any]) -> str | None:
    """The base model's own name of a licence that the Hub has no id for; None where `license` is an id of the Hub's."""
    licence, name = _word(card, "license"), _word(card, "license_name")
    if licence.lower() in ("", "other"):
        return name or None
    return None if licence_of(licence).id in HUB_IDS else licence


def declared_link(card: Mapping[str, Any]) -> str | None:
    """Where the base model's licence can be read: an address, or LICENSE or LICENSE.md in the repository; else None."""
    link = _word(card, "license_link")
    return link if _LINK.fullmatch(link) else None


def front_matter(identifier: str | None, name: str | None, link: str | None) -> dict[str, str]:
    """`license`, `license_name` and `license_link` as the Hub takes them in a card; {} for no licence.

    `identifier` is Licence.id, `name` and `link` are from declared_name and declared_link.
    """
    identifier = identifier or ""
    if not identifier and not name:
        return {}
    found = {"license": identifier}
    if name or identifier not in HUB_IDS:
        found = {"license": "other"}
        # An id of its own: nothing but small letters, digits, dots and hyphens.
        word = re.sub(r"[^a-z0-9.]+", "-", clean(name or identifier).lower()).strip("-.")[:100]
        if word and word != "other":
            found["license_name"] = word
    if link and _LINK.fullmatch(link):
        found["license_link"] = link
    return found


def _word(card: Mapping[str, Any], key: str) -> str:
    """The text at a key of a card's metadata, also if it is the only one of a list; "" where there is none."""
    value = card.get(key)
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    limit = 600 if key == "license_link" else 100
    return " ".join(clean(value).split())[:limit] if isinstance(value, str) else ""


def licence_of(licence: str | None) -> Licence:
    """The rules of a licence; of one that is not in the table: private only."""
    identifier = (licence or "").strip().lower()
    return _TABLE.get(_ALIASES.get(identifier, identifier)) or Licence(identifier, public=False)


def fits(name: str, licence: Licence) -> bool:
    """Does a repository's name (without its owner) begin as the licence asks? "Llama-32" does not begin with Llama 3."""
    return name.startswith(licence.prefix) and not (
        licence.prefix[-1:].isdigit() and name[len(licence.prefix) :][:1].isdigit()
    )


def default_repo_name(model: str, licence: str | None) -> str:
    """The name for the ablated copy of a model id or folder: "Qwen3-14B-ablated", prefixed as the licence asks."""
    base = model.rstrip("/").rsplit("/", 1)[-1]
    # What the Hub takes in a name: letters, digits, and single - . _ that do not stand at either end.
    base = re.sub(r"[^A-Za-z0-9._-]+", "-", base)
    base = re.sub(r"-{2,}", "-", re.sub(r"\.{2,}", ".", base)).strip("-._") or "model"
    return _prefixed(f"{base}-ablated", licence_of(licence))


def check(licence: str | None, repo: str, public: bool) -> Licence:
    """The rules of `licence`, if a copy called `repo` ("owner/name" or "name") keeps them.

    Raises Problem with the name that would do, or with the way to stay private.
    """
    rules = licence_of(licence)
    owner, slash, name = repo.rpartition("/")
    if not fits(name, rules):
        raise Problem(
            f"the licence {rules.id} asks that the model's name begins with {rules.prefix!r}, and {name!r:.120} does not."
            f" Set REPO={owner}{slash}{_prefixed(name, rules)}"
        )
    if public and not rules.public:
        which = f"the licence {rules.id!r:.60} is not known here" if rules.id else "the base model names no licence"
        raise Problem(f"{which}, so nothing says that a copy may be public. Leave PUBLIC unset to publish privately")
    return rules


def goes_along(names: Iterable[str]) -> list[str]:
    """Of a repository's file names (top level), those that go along with a copy: licence, notice and terms of use."""
    return [name for name in names if is_licence_file(name)]


def is_licence_file(name: str) -> bool:
    """Is this the name of a licence, a notice or terms of use, in any case of letters? Programs and archives are not."""
    return "/" not in name and bool(_LICENCE_FILE.fullmatch(name)) and manifest.may_be_published(name)


def _prefixed(name: str, licence: Licence) -> str:
    if not fits(name, licence):
        # "Meta-Llama-3-8B" and "llama-3-8b" hold what is asked for; it only has to stand in front, as written.
        tail = re.sub(r"(?i)^meta[-_]", "", name)
        if tail.lower().startswith(licence.prefix.lower()) and fits(
            licence.prefix + tail[len(licence.prefix) :], licence
        ):
            name = licence.prefix + tail[len(licence.prefix) :]
        else:
            name = f"{licence.prefix}-{name}"
    if len(name) > MAX_NAME - len("-nf4"):  # the 4-bit copy's name is this one with -nf4
        name = name[: MAX_NAME - len("-ablated-nf4")].rstrip("-._") + "-ablated"
    return name
