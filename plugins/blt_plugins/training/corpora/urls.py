"""URLs in messages and in indexes, which others may read: without what gives access."""

from __future__ import annotations

import hashlib
import re

#: A user and a password before a host; what stands after ``?``, such as a signature.
_SECRETS = re.compile(r"(?<=://)[^/?#\s'\"]*@|\?[^\s'\"?]*=[^\s'\"]*?(?=::|[\s'\")>]|$)")


def is_url(path: str) -> bool:
    """Whether fsspec is to read ``path``, as it does ``s3://bucket/name``."""
    return "://" in path


def shown(text: str) -> str:
    """A path, a URL or a message as it may be shown: URLs without users, passwords and queries."""
    return _SECRETS.sub("", text) if is_url(text) else text


def hash_of(text: str) -> str:
    """What tells texts apart, and does not tell them: their SHA-256, in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
