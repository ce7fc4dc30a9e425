"""The configurations of the bases that shipped recipes name, so that they can be estimated before anything is fetched.

bases.json has of each what config.json says of sizes, what the hub says of the number of its parameters, and where this is
from.
"""

import json
from pathlib import Path
from typing import Any

from pe_dpo.errors import ModelError
from pe_dpo.hub import hub_is_reachable
from pe_dpo.model.base import read_config

FILE = Path(__file__).with_name("bases.json")


def kept_bases() -> dict[str, dict[str, Any]]:
    """Return what is kept, by the name on the hub: config, parameters and source."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def find_config(base: str, revision: str | None = None) -> tuple[Any, str]:
    """Return transformers' configuration of a base, and where it is from, for people.

    Args:
        base: path or hub id.
        revision: of a hub id.

    Raises:
        ModelError: it is neither here nor on the hub nor kept.
    """
    from transformers import AutoConfig

    kept = kept_bases().get(base)
    if kept is not None and not Path(base).exists() and not hub_is_reachable():
        try:
            return read_config(base, revision=revision), "config.json"
        except ModelError:  # not in the cache of the hub
            config = dict(kept["config"])
            return AutoConfig.for_model(
                config.pop("model_type"), **config
            ), "sizes of the base are those that the package keeps"
    return read_config(base, revision=revision), "config.json"
