#!/usr/bin/env bash
# Build the site strictly, into build/site. `scripts/docs.sh serve` serves it, and rebuilds it when a page changes.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
if [ ! -x "$VENV/bin/mkdocs" ]; then install "[docs]"; fi
export NO_MKDOCS_2_WARNING=1 # of another program's future
if [ "${1:-build}" = serve ]; then exec "$VENV/bin/mkdocs" serve "${@:2}"; fi
exec "$VENV/bin/mkdocs" build --strict "${@:2}"
