#!/usr/bin/env bash
# Trains on several nodes with DeepSpeed, with spectral_ds attached to a script that need not know it.
#
#   bash launch/multinode.sh --hostfile HOSTS [OPTIONS] TRAIN.py [ARGUMENTS]
#   bash launch/multinode.sh --hostfile HOSTS --no_ssh --node_rank R [OPTIONS] TRAIN.py [ARGUMENTS]
#   bash launch/multinode.sh --nodes N --slots S --no_ssh --node_rank R --master_addr A [OPTIONS] TRAIN.py ...
#
# The first is started once, and starts the second on every host of the file by ssh, in the same
# folder. The second and the third are started on every node, and do there: choose the network
# interface (network.sh), check that all nodes have the same packages and configuration
# (spectral-ds check), then run `deepspeed --no_ssh --module spectral_ds.run TRAIN.py ARGUMENTS`.
# The runner leaves alone what TRAIN.py attaches itself, and trains as always without a section.
#
# In:  --hostfile HOSTS   DeepSpeed's: a line "host slots=ranks" for each node, node 0 first
#      --nodes N --slots S   instead of it: N nodes of S ranks each
#      --no_ssh --node_rank R   this is node R, counted from 0
#      --master_addr A    node 0, as the others see it (default: the first host)
#      --master_port P    for the training, and P + 1 for the check, free on node 0 (default 29500)
#      --config FILE      to compare (default: what ARGUMENTS have after --deepspeed_config or
#                         --deepspeed); SPECTRAL_DS_CONFIG is compared too
#      --check_timeout S  seconds to wait for all nodes to come (default 600)
#      TRAIN.py           or -m MODULE
#      The programs spectral-ds and deepspeed on PATH, else those of .venv in this repository.
#      ssh logs in without a password; its own configuration says user, port and key. Nodes get this
#      folder and PATH, LD_LIBRARY_PATH, CUDA_HOME and all variables that begin with a prefix below.
# Out: what TRAIN.py gives; by ssh, each line after "host: ". Exit status 0, or that of the first
#      node that fails. By ssh the others are then ended, and all are when this script ends, in
#      whatever way. Without ssh that is left to whoever started the nodes; srun and Kubernetes do it.
set -euo pipefail

PREFIXES="SPECTRAL_DS_ DS_ NCCL_ GLOO_ TORCH OMP_ MKL_ PYTHON HF_ TRANSFORMERS_ TOKENIZERS_ WANDB_"
SSH=(ssh -o BatchMode=yes -o ConnectTimeout=20 -o ServerAliveInterval=15 -o ServerAliveCountMax=4)
# For a node to end by TERM before it is killed, and for all of them to have ended by ssh.
SECONDS_TO_END=10
SECONDS_FOR_ALL=30

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
hostfile="" nodes="" slots="" no_ssh="" node_rank="" master_addr="" config=""
master_port=29500
check_timeout=600
names=() ranks=() command=() group="" node_groups=()

say() { printf 'multinode: %s\n' "$*" >&2; }
die() { say "$*"; exit 2; }

# --- what was asked for ------------------------------------------------------------------------

# need_number NAME VALUE LEAST MOST
need_number() {
    if [[ ! $2 =~ ^(0|[1-9][0-9]{0,8})$ ]] || (($2 < $3 || $2 > $4)); then
        die "$1 $2: must be a whole number from $3 to $4"
    fi
}

while (($#)); do
    case $1 in
        --hostfile | --nodes | --slots | --node_rank | --master_addr | --master_port | --config | --check_timeout)
            [[ -n ${2:-} ]] || die "$1 needs a value"
            printf -v "${1#--}" %s "$2"
            shift 2 ;;
        --no_ssh) no_ssh=yes; shift ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' "${BASH_SOURCE[0]}"; exit 0 ;;
        -m) [[ -n ${2:-} ]] || die "-m needs a module"; break ;;
        -*) die "unknown argument $1 before TRAIN.py (known: --hostfile, --nodes, --slots, --no_ssh, --node_rank," \
                "--master_addr, --master_port, --config, --check_timeout)" ;;
        *) break ;;
    esac
done
(($#)) || die "no script was given: multinode.sh [OPTIONS] TRAIN.py [ARGUMENTS]"
command=("$@")
need_number --master_port "$master_port" 1 65534
need_number --check_timeout "$check_timeout" 1 999999999

read_hostfile() {
    local line number=0
    [[ -r $hostfile && ! -d $hostfile ]] || die "--hostfile $hostfile: no such file, or not readable"
    while IFS= read -r line || [[ -n $line ]]; do
        number=$((number + 1))
        [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
        [[ $line =~ ^[[:space:]]*([A-Za-z0-9_][A-Za-z0-9._:@-]*)[[:space:]]+slots=([1-9][0-9]{0,3})[[:space:]]*(#.*)?$ ]] ||
            die "--hostfile $hostfile: line $number is \"$line\", must be \"host slots=ranks\""
        [[ " ${names[*]-} " != *" ${BASH_REMATCH[1]} "* ]] ||
            die "--hostfile $hostfile: line $number: the host ${BASH_REMATCH[1]} is there already"
        names+=("${BASH_REMATCH[1]}")
        ranks+=("${BASH_REMATCH[2]}")
    done <"$hostfile"
    ((${#names[@]})) || die "--hostfile $hostfile: has no host"
}

if [[ -n $hostfile ]]; then
    [[ -z $nodes$slots ]] || die "--nodes and --slots stand in place of --hostfile; give one of them"
    read_hostfile
else
    [[ -n $nodes && -n $slots ]] || die "needs --hostfile HOSTS, or --nodes N and --slots S"
    need_number --nodes "$nodes" 1 99999
    need_number --slots "$slots" 1 9999
    [[ -n $no_ssh ]] || die "--nodes $nodes: has no names for ssh; give --no_ssh --node_rank R, or --hostfile"
    [[ -n $master_addr ]] || die "--nodes $nodes: needs --master_addr, the address of node 0"
    for ((i = 0; i < nodes; i++)); do names+=("node-$i") ranks+=("$slots"); done
fi
nodes=${#names[@]}
master_addr=${master_addr:-${names[0]#*@}}
if [[ -n $no_ssh ]]; then
    [[ -n $node_rank ]] || die "--no_ssh needs --node_rank R, from 0 to $((nodes - 1))"
    need_number --node_rank "$node_rank" 0 $((nodes - 1))
else
    [[ -z $node_rank ]] || die "--node_rank $node_rank: goes with --no_ssh only"
fi

venv=${SPECTRAL_DS_VENV:-$root/.venv}
command -v spectral-ds >/dev/null || PATH=$venv/bin:$PATH
# Notices of torch to DeepSpeed, not to the user.
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore::FutureWarning}
scratch=$(mktemp -d)

# --- on one node -------------------------------------------------------------------------------

# DeepSpeed's launcher does not end its ranks when it is ended itself; its process group does.
end_group() {
    local tenth
    [[ -n $group ]] && kill -TERM -- "-$group" 2>/dev/null || return 0
    for ((tenth = 0; tenth < SECONDS_TO_END * 10; tenth++)); do
        kill -0 -- "-$group" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL -- "-$group" 2>/dev/null || true
}

# Runs a command so that nothing of it outlives this script.
run() {
    local status=0
    set -m
    "$@" </dev/null &
    group=$!
    set +m
    wait "$group" || status=$?
    end_group
    group=""
    return "$status"
}

# Prints the configuration that TRAIN.py is given, if it can be seen.
config_of_command() {
    local i
    for ((i = 1; i < ${#command[@]}; i++)); do
        case ${command[i]} in
            --deepspeed_config=* | --deepspeed=*) printf %s "${command[i]#*=}"; return ;;
            --deepspeed_config | --deepspeed)
                # Scripts of DeepSpeed's own kind have --deepspeed as a flag.
                [[ ${command[i + 1]:--} == -* ]] || { printf %s "${command[i + 1]}"; return; } ;;
        esac
    done
}

on_this_node() {
    local program i
    for program in spectral-ds deepspeed; do
        command -v "$program" >/dev/null ||
            die "no program $program on PATH, nor in $venv/bin; run bash $root/launch/setup.sh, or add its folder to PATH"
    done
    [[ ${command[0]} == -m || -f ${command[0]} ]] || die "${command[0]}: no such file on $(uname -n), in $PWD"
    source "$root/launch/network.sh" "$master_addr" || exit 1
    config=${config:-$(config_of_command)}
    run spectral-ds check --nodes "$nodes" --node-rank "$node_rank" --master-addr "$master_addr" \
        --master-port $((master_port + 1)) --timeout "$check_timeout" --same "slots=${ranks[*]}" \
        ${config:+--config "$config"}
    # Names only keep the nodes apart here; DeepSpeed resolves none of them.
    for ((i = 0; i < nodes; i++)); do printf '%s slots=%s\n' "${names[i]}" "${ranks[i]}"; done >"$scratch/hostfile"
    run deepspeed --hostfile "$scratch/hostfile" --no_ssh --node_rank "$node_rank" \
        --master_addr "$master_addr" --master_port "$master_port" --module spectral_ds.run "${command[@]}"
}

# --- by ssh ------------------------------------------------------------------------------------

# What bash runs on node $1. It comes by standard input, which stays open as long as this script
# lives: when it ends there, however that happened, the node is ended.
script_of_node() {
    local name prefix words i
    words=(--no_ssh --node_rank "$1" --master_addr "$master_addr" --master_port "$master_port"
        --check_timeout "$check_timeout" ${config:+--config "$config"} "${command[@]}")
    printf '{ cd %q || exit\n' "$PWD"
    for name in $(compgen -e); do
        for prefix in PATH= LD_LIBRARY_PATH= CUDA_HOME= $PREFIXES; do
            [[ $name= == "$prefix"* ]] && printf 'export %s=%q\n' "$name" "${!name}"
        done
    done
    printf 'exec 3<&0\nbash %q --hostfile <(printf "%%s\\n"' "$root/launch/multinode.sh"
    for ((i = 0; i < nodes; i++)); do printf ' %q' "${names[i]} slots=${ranks[i]}"; done
    printf ')'
    printf ' %q' "${words[@]}"
    cat <<'REMOTE'
 </dev/null 3<&- &
node=$!
{ read -r <&3; kill "$node"; } >/dev/null 2>&1 &
watch=$!
status=0
wait "$node" || status=$?
kill "$watch" 2>/dev/null
exit "$status"; }
REMOTE
}

# Progress bars go back to the start of their line: a line of its own for each of their states.
after_name() { stdbuf -oL tr '\r' '\n' | sed -u "s|^|$1: |"; }

# start_node RANK: leaves its exit status in a file.
start_node() {
    local status=0 name=${names[$1]}
    "${SSH[@]}" "$name" bash -s < <(script_of_node "$1"; read -r <&4) \
        > >(after_name "$name") 2> >(after_name "$name" >&2) || status=$?
    echo "$status" >"$scratch/new.$1"
    mv "$scratch/new.$1" "$scratch/status.$1"
}

# Waits until all nodes have ended, for at most $1 s if given; or, without, until one has failed.
wait_for_nodes() {
    local i ended deadline=$((SECONDS + ${1:-0}))
    while :; do
        ended=0
        for ((i = 0; i < nodes; i++)); do
            [[ -f $scratch/status.$i ]] || continue
            ended=$((ended + 1))
            (($# || $(<"$scratch/status.$i") == 0)) || { failed=$i; return; }
        done
        ((ended < nodes)) || return 0
        (($# == 0 || SECONDS < deadline)) || return 0
        sleep 0.2 3>&-
    done
}

end_nodes() {
    local i
    ((${#node_groups[@]})) || return 0
    exec 3>&-
    wait_for_nodes "$SECONDS_FOR_ALL"
    for ((i = 0; i < ${#node_groups[@]}; i++)); do
        [[ -f $scratch/status.$i ]] && continue
        say "${names[i]} has not ended after $SECONDS_FOR_ALL s; its processes may still run"
        kill -KILL -- "-${node_groups[i]}" 2>/dev/null || true
    done
    node_groups=()
}

by_ssh() {
    local i failed="" status
    command -v ssh >/dev/null || die "no program ssh on PATH; start each node with --no_ssh --node_rank R"
    mkfifo "$scratch/lifeline"
    # Only this process holds the end that is written to.
    # shellcheck disable=SC2094  # nothing ever is
    exec 3<>"$scratch/lifeline" 4<"$scratch/lifeline"
    set -m
    for ((i = 0; i < nodes; i++)); do
        start_node "$i" 3>&- &
        node_groups+=($!)
    done
    set +m
    wait_for_nodes
    [[ -n $failed ]] || return 0
    status=$(<"$scratch/status.$failed")
    say "${names[failed]} (node $failed) ended with status $status; the others are ended"
    end_nodes
    exit "$status"
}

cleanup() {
    trap '' INT TERM HUP
    end_group
    end_nodes
    rm -rf "$scratch"
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

if [[ -n $no_ssh ]]; then on_this_node; else by_ssh; fi
