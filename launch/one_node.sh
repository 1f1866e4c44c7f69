#!/usr/bin/env bash
# Train on this machine, one process for each of its GPUs, or for each of its cores where it has none.
#
#     [PROCESSES=2] launch/one_node.sh [options of launch/train.py]
#
# PROGRAM=launch/accelerate_train.py trains by accelerate instead; RESTARTS=3 begins again from the checkpoint, as often, after a
# process has failed; PYTHON is the interpreter. Nothing is reachable from outside.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python3}" "$here/agent.py" \
    --nproc-per-node "${PROCESSES:-auto}" --max-restarts "${RESTARTS:-0}" \
    "${PROGRAM:-$here/train.py}" "$@"
