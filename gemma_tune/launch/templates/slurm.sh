#!/bin/bash
# {{stage}} of {{recipe}}, written by `gemma-tune launch --template slurm`.
# Submit it with sbatch, from a folder that all nodes see. Add what your site asks for: --partition, --account, --mem.
#SBATCH --job-name={{name}}
#SBATCH --nodes={{nodes}}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={{gpus}}
#SBATCH --cpus-per-task={{cpus}}
#SBATCH --time={{time}}
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180

# One task a node: it starts a process for each GPU, and finds rank and address of its node in SLURM_*. When one node
# fails the others cannot go on, and --kill-on-bad-exit ends them. srun has not taken --cpus-per-task from sbatch since
# SLURM 22.05.
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    {{command}} &
step=$!

# 180 seconds before the time limit, and before a preemption where the site sends it, this shell gets USR1. srun hands a
# signal on to its tasks, which save and end with 75. TERM comes with scancel: save, but do not come back.
signals=0
warned=no
trap 'signals=$((signals + 1)); warned=yes; kill -USR1 "$step"' USR1
trap 'signals=$((signals + 1)); kill -TERM "$step"' TERM

# A signal ends `wait` before srun has ended; then wait again.
seen=-1
while [ "$seen" != "$signals" ]; do
    seen=$signals
    wait "$step"
    code=$?
done

if [ "$warned" = yes ] && [ "$code" -eq 75 ]; then
    echo "stopped for the time limit after run $((${SLURM_RESTART_COUNT:-0} + 1)): back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
