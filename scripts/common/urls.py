"""Where a service is: base URLs from environment variables, fit to send a key to."""

from __future__ import annotations

import ipaddress
import os
import re
from urllib.parse import urlsplit

from common.problems import Problem


def base_url(variable: str, default: str) -> str:
    """The base URL that a variable names (`default` where it is empty), without a trailing slash.

    Raises Problem naming the variable; a password in a URL is not shown.
    """
    url = (os.environ.get(variable) or default).rstrip("/")
    named = variable if "@" in url else f"{variable}={url!r:.80}"
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # reading the port checks it
    except ValueError:
        host = None
    if (
        not host
        or parts.scheme not in ("http", "https")
        or not re.fullmatch(r"[\x21-\x7e]+", url)
        or set("?#@") & set(url)
    ):
        raise Problem(f"{named} is not a URL like {default}")
    if parts.scheme == "http" and not is_near(host):
        raise Problem(f"{named} would send the key unencrypted; use https")
    return url


def is_near(host: str) -> bool:
    """Is this host the machine itself or the local RunPod's container?

    A key must not cross a network in the clear, so plain HTTP is for these only.
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or (host.startswith("open-synthesis-") and "." not in host)
