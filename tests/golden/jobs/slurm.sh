#!/bin/bash
# sft of my recipe.yaml, written by `gemma-tune launch --template slurm`.
# Submit it with sbatch, from a folder that all nodes see. Add what your site asks for: --partition, --account, --mem.
#SBATCH --job-name=gemma-my-first-run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=12:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180

# One task a node: it starts a process for each GPU, and finds rank and address of its node in SLURM_*. When one node
# fails the others cannot go on, and --kill-on-bad-exit ends them. srun has not taken --cpus-per-task from sbatch since
# SLURM 22.05.
srun --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
    gemma-tune sft 'my recipe.yaml' optim.learning_rate=1e-4 'samples.prompts.0=it'"'"'s "so"' --accelerate ddp --resume auto &
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
