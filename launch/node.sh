#!/bin/bash
# One node's share of a run: `accelerate launch` with this node's rank, and signals passed on. Started on every node by
# slurm/train.sbatch or cluster.sh, with the arguments of `accelerate launch`.
# Clusters signal this script alone. The launcher below it does not know SIGUSR1 and would die of it, so the training
# processes, its children, are sent it directly: they save at their next step and stop.
# REQUEUE: a file that the run writes when it wants to be started again; this script then ends with 75.
set -euo pipefail

rank=${NODE_RANK:-${SLURM_NODEID:-0}}
launcher=
# shellcheck disable=SC2329 # called by the trap
save_and_stop() {
  echo "node $rank: asking the training processes to save and stop"
  [[ -z $launcher ]] || pkill -USR1 --parent "$launcher" --full launch/train.py || true
}
trap save_and_stop USR1 TERM

accelerate launch --machine_rank "$rank" "$@" &
launcher=$!

# A trapped signal ends a wait, not the launcher.
while kill -0 "$launcher" 2>/dev/null; do
  wait "$launcher" || true
done
status=0
wait "$launcher" || status=$?
if [[ $status != 0 && -n ${REQUEUE:-} && -e $REQUEUE ]]; then exit 75; fi
exit "$status"
