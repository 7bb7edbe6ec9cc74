#!/usr/bin/env bash
# Set up .venv where needed, then lint and test. Arguments go to pytest: bash tests/run.sh -k splits
set -euo pipefail
cd "$(dirname "$0")/.."
source common/venv.sh
ensure_venv requirements.txt tests/requirements.txt

"$PY" -m ruff check .
"$PY" -m ruff format --check .
# two processes, one module at a time each: every test keeps to one thread. By default modules of few tests,
# which here are the slow ones, would come last, and one process would wait for the other.
exec "$PY" -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
