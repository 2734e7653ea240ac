"""Keeping secrets out of what is printed: values that look like one, and those that the environment holds."""

from __future__ import annotations

import os
import re

HIDDEN = "[hidden]"
# Tokens by the marks that their issuers put on them: Hugging Face, RunPod, GitHub, OpenAI, AWS; private keys; and
# passwords in URLs.
LOOKS_SECRET = re.compile(
    r"\b(?:hf_|rpa_|rps_|gh[pousr]_|github_pat_|sk-|AKIA)[A-Za-z0-9_-]{12,}|-----BEGIN [A-Z ]*PRIVATE KEY"
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
# Names of variables whose value is a secret.
NAMES_SECRET = re.compile(r"(?:^|_)(?:TOKEN|KEY|APIKEY|SECRET|PASS|PASSWORD|PASSWD|PWD|CREDENTIALS?)(?:_|$)", re.I)
_FOLDERS = ("PWD", "OLDPWD")  # the shell's own; everywhere else PWD is short for password
_SHORTEST = 8  # a shorter value would hide ordinary words


def redact(text: str) -> str:
    """`text` without tokens, and without the value of any variable of the environment whose name says it is a secret."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and name not in _FOLDERS and NAMES_SECRET.search(name) and value in text:
            text = text.replace(value, HIDDEN)
    return LOOKS_SECRET.sub(HIDDEN, text)
