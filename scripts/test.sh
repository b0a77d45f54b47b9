#!/usr/bin/env bash
# Set everything up and run the tests, one more at a time than there are cores. Arguments go to pytest.
set -euo pipefail
# Tests start many processes: what one of them compiles, the others need not.
unset PYTHONDONTWRITEBYTECODE
source "$(dirname "$0")/setup.sh"
install "[test]"
# The models under test are tiny: threads of several processes would only wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$VENV/bin/python" -m pytest --numprocesses auto --dist worksteal "$@"
