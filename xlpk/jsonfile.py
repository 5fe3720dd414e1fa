"""JSON from files that nobody vouches for: each key once, and typed access whose failures are one line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from xlpk.errors import InputError, shown


def parse_json(content: bytes, label: str) -> object:
    """Strict JSON: UTF-8, each key once. A failure is an InputError about `label`."""

    def once(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{label}:{shown(key)}", "twice", "each key once")
            found[key] = value
        return found

    try:
        parsed: object = json.loads(content.decode("utf-8"), object_pairs_hook=once)
    except InputError:
        raise
    except RecursionError:
        raise InputError(label, "deeply nested", "JSON of a sane depth") from None
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, and integers of thousands of digits
        raise InputError(label, shown(str(error)), "valid JSON in UTF-8") from None
    return parsed


def read_bytes(file: Path) -> bytes:
    """The whole file. Raises InputError naming the model's folder, or the file."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise InputError("model.path", file.parent, f"a folder that holds {file.name}") from None
    except OSError as error:
        raise InputError(str(file), error.strerror, "a readable file") from None


class Fields:
    """Typed access to a parsed JSON object; a wrong type or a missing field is an InputError named `source:field`."""

    def __init__(self, raw: object, source: str) -> None:
        if not isinstance(raw, dict):
            raise InputError(source, shown(raw), "a JSON object")
        self.raw: dict[str, Any] = raw
        self.source = source

    def refuse(self, key: str, value: object, allowed: str) -> InputError:
        return InputError(f"{self.source}:{key}", shown(value), allowed)

    def get(self, key: str) -> Any:
        """The value at `key`, dots descend; null and absent are one."""
        value: Any = self.raw
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.refuse(key, "missing", "a whole number is required")
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.refuse(key, "missing", "a number is required")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse(key, value, "a number")
        try:
            return float(value)
        except OverflowError:
            raise self.refuse(key, value, "a finite number") from None

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return value

    def token_ids(self, key: str, *, several: bool = True) -> tuple[int, ...]:
        """One id, a list of them where `several`, or none for null."""
        value = self.get(key)
        ids = value if several and isinstance(value, list) else () if value is None else (value,)
        if any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
            raise self.refuse(key, value, "a token id, a list of them or null" if several else "a token id or null")
        return tuple(ids)
