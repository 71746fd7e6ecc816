"""What a store holds: a result, and a folder that is made."""

from __future__ import annotations

from pathlib import Path


def place(store: Path, name: str) -> Path:
    """Where a store keeps a result."""
    return store / name[:2] / f"{name}.safetensors"


def make(staged: Path) -> None:
    staged.mkdir()
    (staged / "config.json").write_text("{}")
    (staged / "weights").write_bytes(bytes(range(256)))
