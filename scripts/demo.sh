#!/usr/bin/env bash
# Set everything up and have the demo model write Python. Arguments go to `blt generate`.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
if [ ! -x "$VENV/bin/blt" ]; then install ""; fi
if [ $# -eq 0 ]; then set -- --prompt $'class Graph:\n    """' --max-new-bytes 217 --temperature 0.6 --seed 14; fi
exec "$VENV/bin/blt" generate "$@"
