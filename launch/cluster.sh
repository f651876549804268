#!/bin/bash
# One node's share of a run, where a cluster starts this script on every node: Kubernetes, SkyPilot, or by hand.
#   NODES=2 NODE_RANK=0 HEAD=first-host GPUS=8 launch/cluster.sh recipes/paper/refcoco_aml --output /shared/runs/x …
# NODES: of the run (1). NODE_RANK: of this one (0). HEAD: host of node 0. PORT: free on it (29400). GPUS: of every node
# (all of this one). ENGINE: a file of configs/accelerate (by the number of nodes).
# SIGTERM and SIGUSR1 ask the run to save and stop. Ends with 0 when the run is done, 75 when it was asked to stop, or
# lost a node, and goes on when it is started again; with another code when it failed.
set -euo pipefail
if [[ $# -lt 1 || $1 == -* ]]; then
  echo "usage: launch/cluster.sh RECIPE [--key value …], from the repository's root" >&2
  exit 2
fi
recipe=$1
shift

nodes=${NODES:-1}
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
if ((nodes > 1)); then engine=multi_node; else engine=ddp; fi
# Checks every flag before a card is used, and names the folder that the run writes to.
output=$(python -m amltrain train --config "$recipe" "$@" --print_config | sed -n 's/^output: //p')
if ((${NODE_RANK:-0} == 0)); then rm -f "$output/requeue"; fi # an earlier start's

export REQUEUE=$output/requeue
exec "$(dirname "$0")/node.sh" \
  --config_file "${ENGINE:-configs/accelerate/$engine.yaml}" \
  --num_machines "$nodes" --num_processes "$((nodes * gpus))" \
  --main_process_ip "${HEAD:-127.0.0.1}" --main_process_port "${PORT:-29400}" \
  launch/train.py --config "$recipe" "$@"
