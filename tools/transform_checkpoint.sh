#!/usr/bin/env bash
# Re-slice a checkpoint offline with several processes. The order of the arguments is that of MindFormers.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash tools/transform_checkpoint.sh SRC_CHECKPOINT SRC_STRATEGY DST_CHECKPOINT_DIR DST_STRATEGY \
                                          WORLD_SIZE PROCESS_NUM [PREFIX] [--OPTION ...]

  SRC_CHECKPOINT      file of complete weights, or the folder that holds rank_<n> folders
  SRC_STRATEGY        its strategy file or folder; None for complete weights
  DST_CHECKPOINT_DIR  folder for the result
  DST_STRATEGY        strategy file or folder of the target; None for complete weights
  WORLD_SIZE          ranks of the target; checked against its strategy
  PROCESS_NUM         processes that copy; any number
  PREFIX              target files are rank_<n>/<PREFIX><n>.ckpt   (checkpoint_)
  --OPTION            any option of `mindformers-ckpt transform`: --overwrite replaces an earlier result in
                      DST_CHECKPOINT_DIR, --resume goes on after an interruption

It returns when all is done, and not with 0 when any part failed. PYTHON names the interpreter (python, else python3).
TEXT
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit 0
fi
PREFIX=checkpoint_
if (($# >= 7)) && [[ $7 != --* ]]; then
    PREFIX=$7
    OPTIONS=("${@:8}")
else
    OPTIONS=("${@:7}")
fi
if (($# < 6)) || [[ ${OPTIONS[0]:-} != "" && ${OPTIONS[0]} != -* ]]; then
    usage >&2
    exit 2
fi

exec "${PYTHON:-$(command -v python || echo python3)}" "$(dirname "${BASH_SOURCE[0]}")/transform_checkpoint.py" \
    --src_checkpoint="$1" --src_strategy="$2" --dst_checkpoint_dir="$3" --dst_strategy="$4" \
    --world_size="$5" --transform_process_num="$6" --prefix="${PREFIX:-checkpoint_}" ${OPTIONS[@]+"${OPTIONS[@]}"}
