#!/usr/bin/env bash
# Set everything up and run the tests. Arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
install "[test]"
exec "$VENV/bin/python" -m pytest "$@"
