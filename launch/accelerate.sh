#!/usr/bin/env bash
# Train by accelerate, as its configuration file says.
#
#     launch/accelerate.sh [options of launch/train.py]
#
# CONFIG is the file, launch/accelerate.yaml without it; PYTHON is the interpreter.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "${PYTHON:-python3}" -m accelerate.commands.launch \
    --config_file "${CONFIG:-$here/accelerate.yaml}" "$here/accelerate_train.py" "$@"
