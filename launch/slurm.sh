#!/bin/bash
# A SLURM job that continues after its time limit, preemption and lost nodes:
#
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=12 launch/slurm.sh \
#         configs/gpt2_small.py --workdir /shared/runs/gpt2
#
# Two minutes before the limit, and on preemption, the job saves, ends with exit code 42 and is
# requeued. A failed job is requeued at most MAX_RESTARTS times, which are counted in
# .slurm-failures-JOB of this folder; a user error (exit code 2) never.
# python launch/local_slurm.py tests all of this on one machine.
#
# Requires one task per GPU, a file system that all nodes share (for --workdir, --data.store and this
# folder), prepared data, and partitions that allow requeueing and have a GraceTime long enough to
# save. Set FLAX_TRANSFORMERS to the path of the command if it is not on the PATH of the nodes. Set
# PREFLIGHT=0 to skip the check by doctor, which does not accept --profile and --dump-hlo. JAX finds
# the other tasks through SLURM; if nodes cannot resolve each other's names, export
# JAX_COORDINATOR_ADDRESS=<address of the first node>:<free port>.
#SBATCH --job-name=flax_transformers
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -u
MAX_RESTARTS=${MAX_RESTARTS:-50}
PROGRAM=${FLAX_TRANSFORMERS:-flax-transformers}
USER_ERROR=2 PREEMPTED=42
# Compilation cache for restarts, shared by all nodes.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.compiled}
# Since SLURM 22.05, srun gives a task one CPU unless it is told otherwise.
if [ "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
fi
# Overlaps collectives with compute (docs.jax.dev, GPU performance tips).
export XLA_FLAGS=${XLA_FLAGS:---xla_gpu_enable_latency_hiding_scheduler=true}

# scancel forwards SIGTERM to the tasks only. A SIGTERM to srun itself would kill the tasks after
# KillWait (30 s), even if they have not saved.
asked_to_stop=
trap 'asked_to_stop=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# Runs a command in all tasks and returns its exit code. srun runs in the background, so that the
# shell can handle SIGTERM. --kill-on-bad-exit ends the tasks that wait for a lost one.
run_in_all_tasks() {
    local code
    srun --kill-on-bad-exit=1 "$PROGRAM" "$@" &
    step=$!
    wait "$step"
    code=$?
    while kill -0 "$step" 2>/dev/null; do # the trap interrupts wait
        wait "$step"
        code=$?
    done
    return "$code"
}

code=0
# Checks every node before training, at every start, because nodes change.
if [ "${PREFLIGHT:-1}" = 1 ]; then
    case ${1:-} in
    -*) run_in_all_tasks doctor || code=$? ;; # resumes without a config, which the run has
    *) run_in_all_tasks doctor --config "$@" || code=$? ;;
    esac
fi
if [ "$code" = 0 ] && [ "$asked_to_stop" ]; then
    code=$PREEMPTED
fi
if [ "$code" = 0 ]; then
    run_in_all_tasks train "$@" || code=$?
fi

echo "exit code $code after ${SLURM_RESTART_COUNT:-0} restart(s)"
failures_file=.slurm-failures-$SLURM_JOB_ID
case $code in
0 | "$USER_ERROR")
    rm -f "$failures_file"
    exit "$code"
    ;;
"$PREEMPTED") ;; # saved, and no failure
*)
    failures=$(($(cat "$failures_file" 2>/dev/null || echo 0) + 1))
    if [ "$failures" -gt "$MAX_RESTARTS" ]; then
        echo "gave up after $failures failures; submit the job again to resume" >&2
        rm -f "$failures_file"
        exit "$code"
    fi
    echo "$failures" >"$failures_file" || exit "$code" # uncounted, it would restart without end
    ;;
esac
scontrol requeue "$SLURM_JOB_ID"
exit "$code"
