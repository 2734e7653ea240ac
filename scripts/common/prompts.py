"""The text that a model sees, rendered from prompts/*.txt, and the rules that keep sources from escaping their block.

Placeholders are `{{name}}` and are filled in one pass, so braces, dollars and even `{{name}}` inside a question or a
source arrive byte for byte. Whatever stands in a source is data: markers that could forge a citation (`[S2]`), close
the block (`</sources>`) or open a turn (`<|im_end|>`) are replaced by look-alikes before the text is placed. Behind that
stands a second wall: the tags around the sources carry a code that no source can know (`mark_of`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from common.text import clean

_PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
# What follows the bracket of anything that could be read as a citation: "S2", "SOURCE 2", "ref. 2", "12]", "1, 3]".
LIKE_A_CITATION = r"\s*(?:(?:sources?|src|refs?|s)\b[^\[\]［\d]{0,20}\d|s\d|\d{1,3}(?:\s*[,;–-]\s*\d{1,3})*\s*\])"
_CITATION = re.compile(rf"\[(?={LIKE_A_CITATION})", re.I)
# A tag of ours, with or without attributes, open or closed.
_TAG = re.compile(r"<(?=\s*(?:/\s*)?(?:source|question))", re.I)
# Control tokens of chat templates: <|im_end|> and kin, <start_of_turn>, <s>, [INST], <<SYS>>.
_CONTROL = re.compile(
    r"<(?=[|｜][^<>‹\s]{1,60}[|｜]>)|<(?=/?(?:s|bos|eos|pad|unk|start_of_turn|end_of_turn|think)>)|\[(?=/?INST\])|<<(?=/?SYS>>)",
    re.I,
)
_LOOK_ALIKE = {"<": "‹", "[": "［", "<<": "‹‹"}
# Stands for each space of a source that is datamarked: hardly any text has it, and most tokenizers know it.
MARKER = "ˆ"
_MARK_DIGITS = 12  # 48 bits; each digit is up to a token in every tag


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replace each `{{name}}` of the template in one pass; values are never read as templates themselves.

    Raises KeyError for a placeholder without a value, so that a typo in a prompt file cannot go unnoticed.
    """
    return _PLACEHOLDER.sub(lambda match: values[match.group(1)], template)


def neutralise(text: str, tokens: Iterable[str] = ()) -> str:
    """`text` with every marker that has a meaning outside it replaced by a look-alike, and cleaned; all else is untouched.

    `tokens`: the control tokens of the tokenizer at hand, so that no string becomes one of them.
    """
    # Cleaned first: an invisible character inside a marker must not hide it here and vanish later.
    text = break_tokens(clean(text), tokens)
    for pattern in (_CONTROL, _TAG, _CITATION):
        text = pattern.sub(lambda match: _LOOK_ALIKE[match.group()], text)
    return text


def break_tokens(text: str, tokens: Iterable[str]) -> str:
    """Break each occurrence of a control token after its first character, so that it is plain text again.

    A single character, or white space, is no control token, whatever the tokenizer's list says.
    """
    for token in sorted(tokens, key=len, reverse=True):
        first, rest = token[:1], token[1:]
        while rest.strip() and token in text:
            text = text.replace(token, _LOOK_ALIKE.get(first, f"{first}\u2060") + rest)
    return text


def mark_of(question: str, sources: Iterable[Mapping[str, str]], context: str = "") -> str:
    """The code in the tags around the sources of one run: a hash over the question and all that goes between the tags.

    Equal input has an equal code, so that runs repeat. Who writes a source cannot put the code into it: the question is
    asked later and is not theirs, the other sources are not theirs either, and the text that would hold the code is part
    of what is hashed, so even with all the rest known it would take some 2^48 trials. (If one succeeds, `neutralise`
    still breaks the tag.)
    """
    held = [[source["id"], clean(source.get("label", "")), clean(source["text"])] for source in sources]
    return hashlib.sha256(json.dumps([clean(question), clean(context), held]).encode()).hexdigest()[:_MARK_DIGITS]


def datamark(text: str) -> str:
    """`text` with MARKER in place of its spaces; line ends stay."""
    return re.sub(r"[^\S\n]+", MARKER, text)


def render_sources(
    sources: Iterable[Mapping[str, str]], mark: str, tokens: Iterable[str] = (), *, datamarked: bool = False
) -> str:
    """The sources as one block, each between tags with the code `mark`, its id and label on the first line.

    <source-3f9a2c… id="S1">
    [S1] Klein et al. (2018) · rct · replication: successful
    its text
    </source-3f9a2c…>
    """
    control = tuple(tokens)
    blocks = []
    for source in sources:
        label = neutralise(" ".join(source.get("label", "").split()), control)
        text = neutralise(source["text"], control)
        number = source["id"]
        first = f"[{number}] {label}".rstrip()
        text = datamark(text) if datamarked else text
        blocks.append(f'<source-{mark} id="{number}">\n{first}\n{text}\n</source-{mark}>')
    return "\n\n".join(blocks)


class Prompts:
    """The prompt files of a folder that the worker reads, and the sha256 of each as it was read."""

    def __init__(self, folder: Path) -> None:
        content = {name: (folder / f"{name}.txt").read_bytes() for name in ("system", "synthesis", "datamark")}
        self.hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
        self.system = content["system"].decode().strip()
        self._synthesis = content["synthesis"].decode().strip()
        self._datamark = fill(content["datamark"].decode().strip(), {"marker": MARKER})

    def user_turn(self, question: str, context: str, mark: str, *, datamarked: bool = False) -> str:
        """The user's turn in the wording of synthesis.txt: the question, and the source block that has the code `mark`."""
        values = {"question": question, "sources": context, "mark": mark}
        return fill(self._synthesis, {**values, "datamark": f" {self._datamark}" if datamarked else ""})
