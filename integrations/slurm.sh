#!/usr/bin/env bash
# Trains on the GPUs of one or more nodes of a Slurm cluster, and goes on by itself where it was stopped (docs/cluster.md).
#
#   sbatch integrations/slurm.sh --config configs/gae_ppo_config.yaml rollout.num_envs=64                one node
#   sbatch --nodes=2 integrations/slurm.sh --config configs/gae_ppo_config.yaml rollout.num_envs=64      two
#   DRY_RUN=1 bash integrations/slurm.sh --config configs/gae_ppo_config.yaml rollout.num_envs=64        print what it would start
#
# Submit it from the repository, after ./start_gae_ppo_training.sh --setup-only, in a folder that all nodes see. Flags are those of
# start_gae_ppo_training.py; RUN=NAME names the run, else the job does. rollout.num_envs are the environments of all GPUs.
#SBATCH --job-name=openvla-ppo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
set -euo pipefail

run=${RUN:-job_${SLURM_JOB_ID:-local}}
gpus=${SLURM_GPUS_ON_NODE:-1}
nodes=${SLURM_JOB_NUM_NODES:-1}
head=localhost
if ((nodes > 1)); then
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # whole: a pipe that `head` closes would end this script
    head=${hosts%%$'\n'*}
fi

command=(
    srun --kill-on-bad-exit=1
    .venv/bin/python -m torch.distributed.run
    --nnodes "$nodes" --nproc-per-node "$gpus" --max-restarts 3
    --rdzv-backend c10d --rdzv-id "${SLURM_JOB_ID:-0}-${SLURM_RESTART_COUNT:-0}" --rdzv-endpoint "$head:${PORT:-29500}"
    start_gae_ppo_training.py "$@" "run.name=$run" --resume auto
)
if [[ ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    exit
fi

# Two minutes before the time is over Slurm tells this shell alone (USR1): the run saves, and the job goes back into the queue.
# What Slurm preempts it requeues itself (TERM to all processes), and what a person cancels stays cancelled.
requeue=false
"${command[@]}" &
job=$!
trap 'requeue=true; kill -TERM "$job"' USR1
trap 'kill -TERM "$job"' TERM INT
status=0
wait "$job" || status=$?
while kill -0 "$job" 2>/dev/null; do # a signal ends the wait before the job has ended
    status=0
    wait "$job" || status=$?
done
if [[ $requeue == true ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
