"""The text that a model sees, rendered from prompts/*.txt, and the rules that keep sources from escaping their block.

Placeholders are `{{name}}` and are filled in one pass, so braces, dollars and even `{{name}}` inside a question or a
source arrive byte for byte. Whatever stands in a source is data: markers that could forge a citation (`[S2]`), close
the block (`</sources>`) or open a turn (`<|im_end|>`) are replaced by look-alikes before the text is placed.
"""

from __future__ import annotations

import hashlib
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


def render_sources(sources: Iterable[Mapping[str, str]], tokens: Iterable[str] = ()) -> str:
    """The sources as one block, each under its own id: `<source id="S1" label="…">` text `</source>`."""
    control = tuple(tokens)
    blocks = []
    for source in sources:
        label = neutralise(" ".join(source.get("label", "").replace('"', "'").split()), control)
        blocks.append(f'<source id="{source["id"]}" label="{label}">\n{neutralise(source["text"], control)}\n</source>')
    return "\n\n".join(blocks)


class Prompts:
    """The prompt files of a folder: `system` and `synthesis`, and the sha256 of each as it was read."""

    def __init__(self, folder: Path) -> None:
        content = {name: (folder / f"{name}.txt").read_bytes() for name in ("system", "synthesis")}
        self.hashes = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
        self.system = content["system"].decode().strip()
        self._synthesis = content["synthesis"].decode().strip()

    def user_turn(self, question: str, context: str) -> str:
        """The user's turn: the question and the source block, in the wording of synthesis.txt."""
        return fill(self._synthesis, {"question": question, "sources": context})
