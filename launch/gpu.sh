#!/usr/bin/env bash
# Says in under 8 minutes whether the plugin runs on the GPUs of this machine, and how fast.
#
#   bash launch/gpu.sh [--out DIR] [--device cpu]
#
#      --out DIR       folder for all that is found (default runs/gpu in the repository)
#      --device cpu    the same from end to end without a GPU, on models of one block
#
# It uses the Python of the repository's .venv, or else python3, with what pyproject.toml lists under
# dependencies, demo and test, and the package itself (pip install --no-deps -e .). torch-sparse and
# pytorch-optimizer are measured where they can be imported. Parts, each with a limit on its time;
# one that fails does not stop the others:
#
#      environment     devices, versions, engines that run
#      cells           the engine matrix against the float64 oracle, and what only shows on a device
#      filter-*        filters beside copying, AdamW, Muon and SOAP
#      step-*          whole steps with the plugin and without
#      scaling         bytes, memory and time on more and more devices, beside the plan
#
# DIR then has report.md, report.json and a log of each part.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
out=$root/runs/gpu device=cuda
while (($#)); do
    case $1 in
        --out | --device)
            [[ -n ${2:-} ]] || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" %s "$2"
            shift 2 ;;
        --help | -h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
[[ $device == cuda || $device == cpu ]] || { usage >&2; exit 2; }

venv=${SPECTRAL_DS_VENV:-$root/.venv} python=python3
[[ -x $venv/bin/python ]] && python=$venv/bin/python
unset PYTHONDONTWRITEBYTECODE
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export DS_ACCELERATOR=$device SPECTRAL_DS_DEVICE=$device
cd "$root"

devices=2
if [[ $device == cuda ]]; then
    devices=$("$python" -c 'import torch; print(torch.cuda.device_count())')
    ((devices)) || { echo "gpu.sh: torch sees no CUDA device; --device cpu runs without one" >&2; exit 1; }
fi

mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 1
for name in environment cells filter-{smollm2,llama-3-8b} step-{plain,zero2,zero3,fsdp2} scaling; do
    rm -f "$out/$name".{json,log,status}
done
rm -f "$out"/report.{json,md}

running=
end() { [[ -z $running ]] || { kill "$running"; wait "$running"; } 2>/dev/null; }
trap 'end; exit 130' INT TERM HUP
# part NAME SECONDS COMMAND...: runs it with a limit, and keeps what it says and how it ended.
part() {
    local name=$1 limit=$2 started=$SECONDS status=0
    shift 2
    printf '== %s (at most %s s): %s\n' "$name" "$limit" "$*"
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1 &
    running=$!
    wait "$running" || status=$?
    running=
    printf '%s %s %s\n' "$status" "$((SECONDS - started))" "$*" >"$out/$name.status"
    ((status == 0)) || { tail -n 5 "$out/$name.log"; echo "   ended with status $status"; }
}
bench() {
    local name=$1 limit=$2 script=$3
    shift 3
    part "$name" "$limit" "$python" "launch/benchmarks/$script.py" --device "$device" "$@" \
        --json "$out/$name.json"
}
# steps NAME SECONDS ENGINE ...: as many ranks as there are devices; more than one under a launcher.
steps() {
    local name=step-$1 limit=$2 engine=$1
    shift 2
    local arguments=(launch/benchmarks/step.py --engine "$engine" --device "$device" "$@"
        --json "$out/$name.json")
    if [[ $engine == plain ]]; then
        part "$name" "$limit" "$python" "${arguments[@]}"
    else
        part "$name" "$limit" "$python" -m torch.distributed.run --standalone \
            --nproc_per_node "$devices" "${arguments[@]}"
    fi
}

part environment 40 "$python" -c 'from spectral_ds.cli import main; raise SystemExit(main())' env --json
if [[ $device == cuda ]]; then
    part cells 130 "$python" -m pytest -q -p no:cacheprovider -p no:xdist tests/test_device.py \
        tests/test_engines.py -k "not replicated_bf16"
    bench filter-smollm2 40 filter --model smollm2-135m --blocks 30 --rounds 15 --whole-steps
    bench filter-llama-3-8b 50 filter --model llama-3-8b --blocks 4 --rounds 9 --whole-steps
    long=(--model llama-3-8b --blocks 2 --tokens 8192 --bf16)
    steps plain 50 "${long[@]}" --methods retain paper gradient_smoothing
    steps zero2 40 "${long[@]}" --methods retain paper
    steps zero3 40 "${long[@]}" --methods retain paper
    steps fsdp2 40 --model smollm2-135m --tokens 8192 --bf16 --methods retain paper naive
    bench scaling 50 scaling
else
    small=(--blocks 1 --tokens 16 --threads 1)
    part cells 300 "$python" -m pytest -q -p no:cacheprovider -p no:xdist tests/test_device.py \
        tests/test_engines.py -k "waits or travel or (every_cell and plain)"
    bench filter-smollm2 200 filter --blocks 1 --rounds 2
    steps plain 300 "${small[@]}" --methods retain paper gradient_smoothing
    steps zero2 300 "${small[@]}" --methods retain
    steps zero3 300 "${small[@]}" --methods retain
    steps fsdp2 300 "${small[@]}" --methods retain naive
    bench scaling 200 scaling --blocks 1 --ranks 1 2
fi

"$python" launch/benchmarks/page.py "$out"
