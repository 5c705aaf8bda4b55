#!/usr/bin/env bash
# Sets the environment up and runs every check: lint, format, types, tests.
#
#   bash launch/test.sh [PYTEST ARGUMENTS]
#
# Tests run in two processes, of one core each.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh"
cd "$root"
export PATH=$root/.venv/bin:$PATH

run() { printf '\n== %s\n' "$*"; "$@"; }

run ruff check
run ruff format --check
run mypy
run pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
