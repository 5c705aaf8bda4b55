#!/usr/bin/env bash
# Sets the environment up and runs every check: lint, format, types, tests.
#
#   bash launch/test.sh [--fast] [PYTEST ARGUMENTS]
#
# --fast leaves out the tests that start a process. Types are checked beside the tests, which run in
# two processes of one core each.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/launch/setup.sh"
cd "$root"
export PATH=${SPECTRAL_DS_VENV:-$root/.venv}/bin:$PATH
# The tests start hundreds of processes: each would compile what it imports again.
unset PYTHONDONTWRITEBYTECODE

show() { printf '\n== %s\n' "$*"; }
run() { show "$@"; "$@"; }

run ruff check
run ruff format --check

found=$(mktemp)
trap 'rm -f "$found"' EXIT
mypy >"$found" 2>&1 &
types=$!
status=0
run pytest -n 2 --dist loadfile --no-loadscope-reorder "$@" || status=$?
show mypy
wait "$types" || status=$?
cat "$found"
exit "$status"
