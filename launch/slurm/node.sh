#!/bin/bash
# One node's share of train.sbatch: `accelerate launch` with this node's rank, and Slurm's signals passed on.
# Slurm signals this script alone. The launcher below it does not know SIGUSR1 and would die of it, so the training
# processes, its children, are sent it directly.
set -euo pipefail

launcher=
# shellcheck disable=SC2329 # called by the trap
save_and_stop() {
  echo "node $SLURM_NODEID: asking the training processes to save and stop"
  [[ -z $launcher ]] || pkill -USR1 --parent "$launcher" --full launch/train.py || true
}
trap save_and_stop USR1 TERM

accelerate launch --machine_rank "$SLURM_NODEID" "$@" &
launcher=$!

# A trapped signal ends a wait, not the launcher.
while kill -0 "$launcher" 2>/dev/null; do
  wait "$launcher" || true
done
wait "$launcher"
