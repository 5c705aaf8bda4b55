#!/usr/bin/env bash
# Runs the tests that start no process with the oldest releases of torch, transformers and DeepSpeed
# that pyproject.toml allows, and with the newest that pip finds.
#
#   bash launch/versions.sh [oldest | newest] [PYTEST ARGUMENTS]
#
# In:  oldest, newest   one of the two (default: both, one after the other)
#      SPECTRAL_DS_VERSIONS   folder of the environments, each of which is made anew and takes several
#                       GB where torch comes with CUDA (default ~/.cache/spectral_ds/versions)
#      what setup.sh takes is passed on, TORCH_SPEC and SPECTRAL_DS_VENV aside
# Out: pytest's report of each; the exit status is that of the last that failed.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
versions=${SPECTRAL_DS_VERSIONS:-${XDG_CACHE_HOME:-$HOME/.cache}/spectral_ds/versions}

case ${1:-} in
    oldest | newest) name=$1; shift ;;
    -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *)
        status=0
        for name in oldest newest; do bash "${BASH_SOURCE[0]}" "$name" "$@" || status=$?; done
        exit "$status" ;;
esac

# asked PACKAGE: what to ask pip for.
asked() {
    case $name in
        oldest) sed -n "s/^ *\"$1>=\([0-9.]*\)\",$/$1==\1/p" "$root/pyproject.toml" ;;
        newest) printf '%s\n' "$1" ;;
    esac
}

venv=$versions/$name
export SPECTRAL_DS_VENV=$venv TORCH_SPEC
TORCH_SPEC=$(asked torch)
mkdir -p "$versions"
rm -rf "$venv"
for package in torch transformers deepspeed; do asked "$package"; done >"$venv.txt"
PIP_CONSTRAINT=$venv.txt bash "$root/launch/setup.sh"

printf '\n== %s: ' "$name"
"$venv/bin/python" - <<'PY'
from importlib.metadata import version

print(*(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed")), sep=", ")
PY
cd "$root"
unset PYTHONDONTWRITEBYTECODE
exec "$venv/bin/pytest" --fast -n 2 --dist loadfile --no-loadscope-reorder "$@"
