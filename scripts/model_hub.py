"""The model hub's client with time limits: its own waits for ever."""

from __future__ import annotations

import os
from typing import Any

TIMEOUT = 10.0  # seconds for each answer


def client(token: str | None = None) -> Any:
    """An HfApi of HF_ENDPOINT whose every request has a time limit. Without a token it asks as anybody could."""
    # Before the import: its reports of use, and a request of its own that precedes the first of ours.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import httpx2
    from huggingface_hub import HfApi, set_client_factory
    from huggingface_hub.utils._http import hf_request_event_hook

    def bounded() -> httpx2.Client:
        made: Any = httpx2.Client(
            event_hooks={"request": [hf_request_event_hook]}, follow_redirects=True, timeout=httpx2.Timeout(TIMEOUT)
        )
        send = made.send

        def send_bounded(request: Any, **options: Any) -> Any:
            # A request that names no limit has one of None, which the client's own does not replace.
            given = request.extensions.get("timeout") or {}
            request.extensions["timeout"] = {
                key: given.get(key) if given.get(key) is not None else TIMEOUT
                for key in ("connect", "read", "write", "pool")
            }
            return send(request, **options)

        made.send = send_bounded
        return made  # type: ignore[no-any-return]

    set_client_factory(bounded)
    endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    return HfApi(endpoint=endpoint, token=token or False, user_agent="open-synthesis")
