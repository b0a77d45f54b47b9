# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment in .venv with blt-core and its pinned
# dependencies. Set PYTHON to choose the interpreter, VENV to choose the folder.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV="${VENV:-.venv}"
if [ ! -x "$VENV/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$VENV" >&2
fi

install() { # install EXTRAS: once, and again when the dependencies change
    local stamp="$VENV/.installed" wanted
    wanted="$1 $(cat pyproject.toml constraints.txt | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing into $VENV ..." >&2
        # Modules are compiled when they are imported, which most never are, unless that is turned off.
        local compile="--no-compile"
        [ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || compile="--compile"
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$compile" \
            --constraint constraints.txt --editable ".$1" >&2
        echo "$wanted" >"$stamp"
    fi
}
