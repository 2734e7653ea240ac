"""RunPod's own description of its API (api-reference-v2/openapi.json of github.com/runpod/docs): the vendor's, not shipped.

It is looked for where RUNPOD_OPENAPI points, and in ../shared/contracts beside the tree; without it whoever imports this is
skipped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

_PATH = Path(
    os.environ.get("RUNPOD_OPENAPI") or Path(__file__).parents[3] / "shared" / "contracts" / "runpod-openapi-v2.json"
)
if not _PATH.exists():
    pytest.skip(f"RunPod's OpenAPI file is not at {_PATH}; set RUNPOD_OPENAPI", allow_module_level=True)
DESCRIPTION: dict[str, Any] = json.loads(_PATH.read_text(encoding="utf-8"))
