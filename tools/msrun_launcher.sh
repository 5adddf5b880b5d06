#!/usr/bin/env bash
# Start a distributed job with MindSpore's msrun, on one machine or several.
# The order, the default and the number of the arguments are those of MindFormers.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash tools/msrun_launcher.sh "SCRIPT [ARGUMENT ...]"
       bash tools/msrun_launcher.sh "SCRIPT [ARGUMENT ...]" WORKER_NUM
       bash tools/msrun_launcher.sh "SCRIPT [ARGUMENT ...]" WORKER_NUM MASTER_PORT LOG_DIR JOIN CLUSTER_TIME_OUT
       bash tools/msrun_launcher.sh "SCRIPT [ARGUMENT ...]" WORKER_NUM LOCAL_WORKER MASTER_ADDR MASTER_PORT \
                                    NODE_RANK LOG_DIR JOIN CLUSTER_TIME_OUT

  WORKER_NUM        workers of the whole job                           (8)
  LOCAL_WORKER      workers on this machine                            (WORKER_NUM)
  MASTER_ADDR       address of the machine with NODE_RANK 0            (127.0.0.1)
  MASTER_PORT       port of the scheduler there                        (8118)
  NODE_RANK         number of this machine                             (0)
  LOG_DIR           folder for scheduler.log and worker_RANK.log       (output/msrun_log)
  JOIN              True:  wait for the job; exit 1 when a worker fails
                    False: start the job and return at once            (False)
  CLUSTER_TIME_OUT  seconds that the workers wait for each other       (7200)

One machine, 4 workers, in the background:
  bash tools/msrun_launcher.sh "run_mindformer.py --config CONFIG --run_mode train" 4
The same, waiting for the end:
  bash tools/msrun_launcher.sh "run_mindformer.py --config CONFIG --run_mode train" 4 8118 output/msrun_log True 300
Two machines of 8 workers, on each with its own NODE_RANK:
  bash tools/msrun_launcher.sh "run_mindformer.py --config CONFIG --run_mode train" \
      16 8 ADDRESS 8118 0 output/msrun_log False 300
TEXT
}

fail() {
    echo "error: $*" >&2
    exit 2
}

WORKER_NUM=8
MASTER_ADDR=127.0.0.1
MASTER_PORT=8118
NODE_RANK=0
LOG_DIR=output/msrun_log
JOIN=False
CLUSTER_TIME_OUT=7200

case $# in
    1) ;;
    2) WORKER_NUM=$2 ;;
    6) WORKER_NUM=$2 MASTER_PORT=$3 LOG_DIR=$4 JOIN=$5 CLUSTER_TIME_OUT=$6 ;;
    9)
        WORKER_NUM=$2 LOCAL_WORKER=$3 MASTER_ADDR=$4 MASTER_PORT=$5 NODE_RANK=$6
        LOG_DIR=$7 JOIN=$8 CLUSTER_TIME_OUT=$9
        ;;
    *)
        usage >&2
        exit 2
        ;;
esac
if [[ $1 == -h || $1 == --help ]]; then
    usage
    exit 0
fi
LOCAL_WORKER=${LOCAL_WORKER:-$WORKER_NUM}

PROBLEMS=()
# check_number NAME LEAST MOST
check_number() {
    local value=${!1}
    if [[ ! $value =~ ^[0-9]{1,9}$ ]]; then
        PROBLEMS+=("$1 is a number, not '$value'")
    elif ((10#$value < $2 || 10#$value > $3)); then
        PROBLEMS+=("$1 is from $2 to $3, not $value")
    fi
}
check_number WORKER_NUM 1 999999
check_number MASTER_PORT 1 65535
check_number CLUSTER_TIME_OUT 1 999999999
if ((${#PROBLEMS[@]} == 0)); then
    check_number LOCAL_WORKER 1 "$WORKER_NUM"
fi
if ((${#PROBLEMS[@]} == 0)); then
    check_number NODE_RANK 0 "$(((WORKER_NUM + LOCAL_WORKER - 1) / LOCAL_WORKER - 1))"
fi
[[ -n $MASTER_ADDR ]] || PROBLEMS+=("MASTER_ADDR is empty; is a variable not set?")
[[ -n $LOG_DIR ]] || PROBLEMS+=("LOG_DIR is empty; is a variable not set?")
[[ $JOIN == True || $JOIN == False ]] || PROBLEMS+=("JOIN is True or False, not '$JOIN'")
((${#PROBLEMS[@]} == 0)) || fail "$(printf '%s; ' "${PROBLEMS[@]}")bash tools/msrun_launcher.sh --help shows the order"
command -v msrun >/dev/null || fail "msrun is not in PATH; it comes with MindSpore: activate its environment"

# The first argument is a command line of its own: split it as a shell does, quotes included, but run nothing.
ORDER=()
while IFS= read -r -d '' word; do
    ORDER+=("$word")
done < <(xargs --no-run-if-empty printf '%s\0' <<<"$1")
wait $! || fail "the first argument is not a valid command line: $1"
((${#ORDER[@]})) || fail "the first argument is the script to run with its arguments, not '$1'"
# "run_mindformer.py ...", as in MindFormers' own folder, means the script beside this one.
TOOLS=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# In "python -m mindformers_ckpt.run run_mindformer.py ..." it is the fourth word, in "python run_mindformer.py" the second.
AT=0
if [[ ${ORDER[0]##*/} =~ ^python[0-9.]*$ ]]; then
    command -v "${ORDER[0]}" >/dev/null || fail "${ORDER[0]} is not in PATH"
    AT=1
    [[ ${ORDER[*]:1:2} != "-m mindformers_ckpt.run" ]] || AT=3
fi
SCRIPT=${ORDER[AT]:-}
if [[ -n $SCRIPT && ! -e $SCRIPT && -e $TOOLS/$SCRIPT ]]; then
    SCRIPT=$TOOLS/$SCRIPT
    ORDER[AT]=$SCRIPT
fi
# What follows other options of python is left to it.
[[ $AT == 1 && $SCRIPT == -* ]] || [[ -n $SCRIPT && -e $SCRIPT ]] || fail "no script '$SCRIPT' in $PWD or $TOOLS"

COMMAND=(msrun "--worker_num=$WORKER_NUM" "--local_worker_num=$LOCAL_WORKER"
    "--master_addr=$MASTER_ADDR" "--master_port=$MASTER_PORT" "--log_dir=$LOG_DIR"
    "--join=$JOIN" "--cluster_time_out=$CLUSTER_TIME_OUT")
if ((LOCAL_WORKER < WORKER_NUM)); then
    COMMAND+=("--node_rank=$NODE_RANK")
fi

case $LOG_DIR in
    /*) logs=$LOG_DIR ;;
    *) logs=$PWD/$LOG_DIR ;;
esac
echo "Running: $(printf '%q ' "${COMMAND[@]}" "${ORDER[@]}")"
echo "Logs: $logs/worker_RANK.log (and scheduler.log)"
if [[ $JOIN == False ]]; then
    echo "The job goes on in the background; follow it with: tail -f $(printf '%q' "$logs")/worker_*.log"
fi
exec "${COMMAND[@]}" "${ORDER[@]}"
