"""Names on the model hub, and whether it can be reached at all: its clients retry an unreachable hub for half a minute."""

import os
import re
import socket
import urllib.parse
import urllib.request
from functools import cache

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SECONDS = 5


def is_hub_name(text: str) -> bool:
    """Return whether `text` can be a name on the hub (`owner/name`), rather than a path."""
    return _NAME.fullmatch(text) is not None


@cache
def hub_is_reachable() -> bool:
    """Return whether the hub answers; looked up once per process, for at most five seconds."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    url = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if urllib.request.getproxies().get(url.scheme):
        return True  # only the proxy knows
    port = url.port or (80 if url.scheme == "http" else 443)
    try:
        socket.create_connection((url.hostname or "", port), timeout=_SECONDS).close()
    except OSError:
        return False
    return True
