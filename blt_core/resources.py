"""Data files that ship with blt-core: ``registry.toml`` and ``configs/``.

They lie at the top of the repository. A wheel carries them as ``blt_core/_data``; an editable
install and a plain checkout read them where they are.
"""

from __future__ import annotations

from pathlib import Path

from blt_core.errors import DataError

_PACKAGE = Path(__file__).resolve().parent


def resource(name: str, *, package: Path = _PACKAGE) -> Path:
    """The path of a shipped file or folder, such as ``"registry.toml"`` or ``"configs"``.

    Raises DataError if neither the installed package nor a checkout around it has one.
    """
    places = [package / "_data" / name]
    # Without this check a stray registry.toml in site-packages would be taken for ours.
    if (package.parent / "pyproject.toml").is_file():
        places.append(package.parent / name)
    for place in places:
        if place.exists():
            return place
    looked = " and ".join(str(place) for place in places)
    raise DataError(f"{name}: not found in this installation (looked for {looked}); reinstall it")
