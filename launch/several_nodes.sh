#!/usr/bin/env bash
# Train on several machines: the same command on each of them.
#
#     NODES=2 ENDPOINT=10.0.0.1:29400 launch/several_nodes.sh [options of launch/train.py]
#
#   NODES      how many machines; training begins when all have come
#   ENDPOINT   address:port of one of them, where the rendezvous listens, and nowhere else: an address of a private network.
#              Without it the job is this machine's own
#   JOB        its name, the same on each machine; needed where several jobs share an endpoint
#   PROCESSES  per machine; without it one for each GPU, or for each core where there is none
#   RESTARTS   how often to begin again, from the checkpoint, after a process has failed
#   PROGRAM    what each process runs; without it launch/train.py
#   PYTHON     the interpreter
#
# Where a machine has several networks, name the one to use: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python3}
endpoint=${ENDPOINT:-127.0.0.1:29400}

# This machine's address towards the endpoint; where it is the endpoint's own, the rendezvous is here.
read -r address rendezvous < <("$python" "$here/address.py" "$endpoint" "${NODES:-1}")

export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$python" "$here/agent.py" \
    --nnodes "${NODES:-1}" --nproc-per-node "${PROCESSES:-auto}" --max-restarts "${RESTARTS:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "${JOB:-syncbn}" \
    --local-addr "$address" --rdzv-conf "$rendezvous" \
    "${PROGRAM:-$here/train.py}" "$@"
