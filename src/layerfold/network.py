"""Whether the Hub can be reached: asked once, quickly, so that being offline is one clear line."""

from __future__ import annotations

import functools
import os
import socket
from urllib.parse import urlsplit

_TIMEOUT_SECONDS = 5.0


@functools.cache
def hub_reachable() -> bool:
    """Tell whether a connection to the Hub can be opened (one attempt of at most 5 seconds, remembered).

    The client libraries retry for half a minute and print a line for each attempt. A user behind a proxy is taken
    to be online, since a direct connection says nothing there.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname or "", port), timeout=_TIMEOUT_SECONDS):
            return True
    except OSError:
        return False
