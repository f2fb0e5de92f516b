#!/bin/bash
# A SLURM job that survives its time limit, preemption and lost nodes:
#
#     sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 launch/slurm.sh \
#         configs/gpt2_small.py --workdir /shared/runs/gpt2
#
# Two minutes before the limit, and when it is preempted, the job saves, ends with 42 and is queued
# again; so is one that failed, at most MAX_RESTARTS times. A mistake in the command (2) is not.
# python launch/local_slurm.py shows all of it on one machine.
#
# Assumes one task per GPU; a file system (--workdir, --data.store, this folder) that all nodes
# share; prepared data; partitions that allow requeueing, with a GraceTime that is enough to save;
# FLAX_TRANSFORMERS, if it is not on the PATH of the nodes. PREFLIGHT=0 leaves doctor out, which
# knows no --profile and no --dump-hlo. JAX finds the other tasks through SLURM. Where nodes cannot
# resolve each other's names, export JAX_COORDINATOR_ADDRESS=<address of the first node>:<free port>.
#SBATCH --job-name=flax_transformers
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

set -u
MAX_RESTARTS=${MAX_RESTARTS:-50}
PROGRAM=${FLAX_TRANSFORMERS:-flax-transformers}
MISTAKE=2 PREEMPTED=42
# A restart finds what was compiled before; on a shared file system for all nodes.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.compiled}
# Moves collectives to where they overlap with compute (docs.jax.dev, GPU performance tips).
export XLA_FLAGS=${XLA_FLAGS:---xla_gpu_enable_latency_hiding_scheduler=true}

# Passed on by scancel, which tells the tasks and no more: srun, told itself, would kill them after
# KillWait (30 s), saved or not.
told_to_stop=
trap 'told_to_stop=1; scancel --signal=TERM "$SLURM_JOB_ID"' TERM

# Runs a command in all tasks and returns its exit code. In the background, so that the shell hears
# TERM meanwhile. --kill-on-bad-exit: who waits for a lost task is ended too.
everywhere() {
    local code
    srun --kill-on-bad-exit=1 "$PROGRAM" "$@" &
    step=$!
    wait "$step"
    code=$?
    while kill -0 "$step" 2>/dev/null; do # the trap ends a wait early
        wait "$step"
        code=$?
    done
    return "$code"
}

code=0
# Without the preflight a slow or unequal node shows after hours. At every start: nodes change.
if [ "${PREFLIGHT:-1}" = 1 ]; then
    everywhere doctor --config "$@" || code=$?
fi
if [ "$code" = 0 ] && [ "$told_to_stop" ]; then
    code=$PREEMPTED
fi
if [ "$code" = 0 ]; then
    everywhere train "$@" || code=$?
fi

echo "exit code $code after ${SLURM_RESTART_COUNT:-0} restart(s)"
case $code in
0 | "$MISTAKE") exit "$code" ;;
esac
if [ "${SLURM_RESTART_COUNT:-0}" -lt "$MAX_RESTARTS" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
