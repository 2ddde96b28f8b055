"""Digests of bytes and files."""

from __future__ import annotations

import hashlib
from pathlib import Path

CHUNK_BYTES = 2**20


def digest(*parts: bytes | Path) -> str:
    """Return the SHA-256, in hexadecimal, of bytes and of the contents of files, one after the other."""
    sha = hashlib.sha256()
    for part in parts:
        if isinstance(part, bytes):
            sha.update(part)
            continue
        with open(part, "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                sha.update(chunk)
    return sha.hexdigest()
