"""Files that are either there in full or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success flush it to disk and rename it to `path`.

    A run that is killed while writing leaves the old file, or none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # one name per target, so that what a killed process leaves is overwritten by the next
    temporary = path.with_name(f".{path.stem}.writing{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":  # the new name itself must survive a power cut too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _dump(value: Any, indent: int) -> str:
    """JSON with one key per line, but lists of plain values on one line."""
    pad = " " * (indent + 1)
    if isinstance(value, dict) and value:
        items = (f"{pad}{json.dumps(str(k))}: {_dump(v, indent + 1)}" for k, v in value.items())
        return "{\n" + ",\n".join(items) + f"\n{' ' * indent}}}"
    if isinstance(value, list | tuple) and any(isinstance(v, dict | list | tuple) for v in value):
        items = (pad + _dump(v, indent + 1) for v in value)
        return "[\n" + ",\n".join(items) + f"\n{' ' * indent}]"
    return json.dumps(value, allow_nan=False)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, readable by people; floats keep all their digits.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    write_text(path, _dump(value, 0) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ValueError: the file is no JSON; names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from None


def sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order, so that equal content gives equal bytes.

    The library writes them in an order that changes from call to call.
    """
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        metadata = header.pop("__metadata__", {})
        header = {"__metadata__": dict(sorted(metadata.items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:  # other escapes than the library's: the order is not worth a copy
            return
        file.seek(8)
        file.write(text.ljust(size))
