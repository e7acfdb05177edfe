#!/usr/bin/env bash
# Start the pretraining command on the ranks of this machine: launch/pretrain.sh [ssr-pretrain's arguments]
# RANKS=N sets how many (default 2). The checkout's .venv is used if there is one.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$here/.venv/bin/python" ] && PATH="$here/.venv/bin:$PATH"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --standalone --nproc-per-node "${RANKS:-2}" -m ssr_deepspeed.pretrain "$@"
