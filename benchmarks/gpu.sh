#!/usr/bin/env bash
# What only a GPU can say, the most valuable first: C++ built, every test that needs one, then rows under results/ and pictures.
#
#     [PYTHON=.venv/bin/python] [SECONDS_IN_ALL=5400] benchmarks/gpu.sh [FOLDER]
#
# What a step prints goes to FOLDER (gpu-logs). Each has a limit, so that one that hangs costs no other; those for which no time is
# left are named. After a third of the time no further test begins, and those that ran are reported: the rows are to follow.
# Exit status: 0 if all succeeded, every test among them, else 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
python=${PYTHON:-.venv/bin/python} in_all=${SECONDS_IN_ALL:-5400} logs=${1:-gpu-logs} status=0 running=
of_resnet50=(32x64x112x112 32x64x56x56 32x256x56x56 32x128x28x28 32x512x28x28 32x256x14x14 32x1024x14x14 32x512x7x7 32x2048x7x7)
mkdir -p "$logs" || exit
trap 'kill $running; exit 130' INT TERM

step() { # its name, the limit in seconds, the command
    local name=$1 limit=$2 began=$SECONDS found="no time is left" left=$((in_all - SECONDS))
    shift 2
    if ((left > 0)); then
        timeout -k 10 "$((left < limit ? left : limit))" "$@" >"$logs/$name.txt" 2>&1 &
        running=$!
        wait "$running"
        found=$?
    fi
    [[ $found == 0 ]] || status=1
    echo "$name: $found, $((SECONDS - began)) s: $*"
}
bench() { step "$1" "$2" "$python" -m syncbn bench "${@:3}"; }

step build 120 "$python" -m syncbn build
step tests $((in_all / 3 + 120)) "$python" -m pytest --session-timeout=$((in_all / 3)) \
    tests/test_*cuda*.py tests/test_devices*.py tests/test_nccl.py tests/test_accelerate.py
bench resnet50 300 resnet50
bench layer-of-resnet50 300 layer --device cuda --shapes "${of_resnet50[@]}"
bench fused 200 fused --device cuda
bench merge 100 merge
bench layer 2400 layer --device cuda
bench plot 60 plot
exit "$status"
