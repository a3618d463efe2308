"""JSON that every reader takes: Python's own writer puts NaN and Infinity into files, which JSON does not know."""

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["strict_json"]


def strict_json(value: Any, indent: int | None = None) -> str:
    """A value of dicts, lists, texts, numbers, bools and None as JSON; numbers that are not finite as null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
