"""Results that outlive a killed run: one JSON line for each, under a key made of everything it depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, TypeVar

from ..runtime import log

T = TypeVar("T")


def content_key(*parts: Any) -> str:
    """Hex key of JSON values."""
    return hashlib.blake2b(json.dumps(parts, ensure_ascii=False).encode(), digest_size=16).hexdigest()


def fingerprint(module: Any) -> str:
    """Hex key of a model's weights: name, shape and up to 1,024 numbers of every parameter, spread over it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in module.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // 1024)][:1024].double().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode() + sample.tobytes())
    return digest.hexdigest()


def pack(result: Any) -> dict[str, Any]:
    """A result's fields as strict JSON: what is not a number is null."""
    found = dataclasses.asdict(result)
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.items()}


def unpack(kind: type[T], fields: dict[str, Any]) -> T:
    """A result from its packed fields."""
    return kind(**{k: math.nan if v is None else v for k, v in fields.items()})


class Store:
    """What has been scored. path None: kept in memory only. A half-written last line is dropped."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.values = path, dict[str, Any]()
        if path is None or not path.is_file():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        for number, line in enumerate(whole.decode("utf-8", "replace").split("\n"), 1):
            try:
                if line:
                    entry = json.loads(line)
                    self.values[entry["key"]] = entry["value"]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {number} is damaged; delete that line or choose a new --out") from error
        if len(whole) < len(data):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        log.info("going on: %d results are in %s", len(self.values), path)

    def get(self, key: str) -> Any:
        """The value of a key, or None."""
        return self.values.get(key)

    def put(self, entries: dict[str, Any]) -> None:
        """Keep values; on disk before this returns."""
        self.values.update(entries)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"key": key, "value": value}, ensure_ascii=False, allow_nan=False) + "\n"
                    for key, value in entries.items()
                )
