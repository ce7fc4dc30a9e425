"""Names on the model hub, what a path of this machine is called elsewhere, and whether the hub can be reached at all.

Its clients retry an unreachable hub for half a minute.
"""

import os
import re
import socket
import urllib.parse
import urllib.request
from functools import cache
from pathlib import Path

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_SECONDS = 5


def is_hub_name(text: str) -> bool:
    """Return whether `text` can be a name on the hub (`owner/name`), rather than a path."""
    return _NAME.fullmatch(text) is not None


def is_local(place: str) -> bool:
    """Return whether a base, an adapter or data lie at a path of this machine, rather than under a name on the hub."""
    return Path(place).is_absolute() or Path(place).exists() or not is_hub_name(place)


def public_name(place: str) -> str:
    """Return what others may read of a place: a name on the hub as it is, of a path its last part alone."""
    return Path(place).name if is_local(place) else place


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
