# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the ablation's tests start programs with."""

from __future__ import annotations

import os

# Variables that would change what is under test: tokens, addresses, caches, and the settings of `make ablate`.
DROPPED = (
    "ABLATED", "ABLATIONS_DIR", "CHECKPOINT_DIR", "CONFIG_DIR", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_TOKEN", "HF_XET_CACHE",
    "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_HUB_CACHE", "MODEL", "PUBLIC", "REPO", "REVISION",
)  # fmt: skip


def environment(**changes: str) -> dict[str, str]:
    """The environment for a program under test: this one's PYTHONPATH, one thread, no hub, no token; then `changes`."""
    kept = {
        name: value for name, value in os.environ.items() if name not in DROPPED and not name.startswith("HERETIC_")
    }
    return {
        **kept,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **changes,
    }
