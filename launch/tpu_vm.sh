#!/bin/bash
# Create a TPU slice as a queued resource, install the current folder on it, and train to the end:
#
#     launch/tpu_vm.sh NAME ZONE TYPE COMMAND ...
#     launch/tpu_vm.sh bert us-central1-a v5litepod-16 \
#         train configs/bert_base.py --workdir gs://BUCKET/runs/bert --data.store gs://BUCKET/stores/wiki
#
# Requires gcloud, a project with quota for TYPE, prepared data in the bucket, and a service account
# of the VMs that can write to the bucket. Copies the current folder to every VM. After a preemption,
# run it again with the same NAME: it creates a new slice and resumes from the newest checkpoint.
# TPU7x is not available as a queued resource: use jobset.yaml or xpk.

set -eu
if [ $# -lt 4 ]; then
    sed -n 's/^# \{0,1\}//; 2,11p' "$0" >&2
    exit 2
fi
NAME=$1 ZONE=$2 TYPE=$3
shift 3
SOFTWARE=${SOFTWARE:-v2-alpha-tpuv5-lite} # v6e: v2-alpha-tpuv6e; v5p: v2-alpha-tpuv5; v4: tpu-ubuntu2204-base
MAX_RESTARTS=${MAX_RESTARTS:-20}
# A v6e core has 128 MiB of VMEM, and programs get 16 MiB by default. Flags that overlap collectives
# with compute are not needed: they are the compiler's defaults.
case $TYPE in v6e*) FLAGS=--xla_tpu_scoped_vmem_limit_kib=98304 ;; *) FLAGS= ;; esac

on_all() {
    gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

state() {
    gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" \
        --format='value(state.state)' 2>/dev/null || echo NONE
}

case $(state) in
SUSPENDED | FAILED) # preempted, or never allocated
    gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet ;;
esac
if [ "$(state)" = NONE ]; then
    # shellcheck disable=SC2086 (zero or more flags)
    gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$SOFTWARE" ${QUEUE_FLAGS:---spot}
fi
missing=0
until found=$(state) && [ "$found" = ACTIVE ]; do
    echo "waiting for $NAME: $found"
    case $found in
    NONE) missing=$((missing + 1)) ;; # for a moment after it was created
    *) missing=0 ;;
    esac
    case $found in FAILED | SUSPENDED) missing=10 ;; esac
    if [ "$missing" -ge 10 ]; then
        echo "$NAME is $found; see: gcloud compute tpus queued-resources describe $NAME --zone=$ZONE" >&2
        exit 1
    fi
    sleep "${POLL_SECONDS:-30}"
done

# Remote commands contain no name chosen by the user, so that a quote in a name cannot break them.
archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
tar --exclude=./.git --exclude='./.venv*' --exclude=./runs -czf "$archive" .
gcloud compute tpus tpu-vm scp "$archive" "$NAME:flax_transformers.tar.gz" --zone="$ZONE" --worker=all
on_all "set -e; mkdir -p flax_transformers; tar -xzf flax_transformers.tar.gz -C flax_transformers; cd flax_transformers
    export PATH=\$HOME/.local/bin:\$PATH
    command -v uv || curl -LsSf https://astral.sh/uv/install.sh | sh
    uv venv --allow-existing --python 3.12 .venv
    uv pip install --python .venv/bin/python -c constraints.txt -e '.[tpu,buckets]'"

arguments=$(printf ' %q' "$@")
restarts=0
while true; do
    code=0
    on_all "cd flax_transformers && JAX_PLATFORMS=tpu JAX_COMPILATION_CACHE_DIR=\$HOME/compiled \
        LIBTPU_INIT_ARGS='$FLAGS' .venv/bin/flax-transformers$arguments" || code=$?
    if [ "$code" = 0 ] || [ "$code" = 2 ]; then exit "$code"; fi
    if [ "$code" = 42 ]; then # stopped on request, saved: no failure
        echo "exit code $code; restart after a preemption"
    elif [ "$restarts" = "$MAX_RESTARTS" ]; then
        echo "exit code $code; gave up after $restarts restart(s); run this again to resume" >&2
        exit "$code"
    else
        restarts=$((restarts + 1))
        echo "exit code $code; restart $restarts of $MAX_RESTARTS"
    fi
    # A process that waits for a lost host keeps its TPU allocated.
    # The brackets keep pkill from matching its own shell.
    on_all "pkill -TERM -f '[.]venv/bin/flax-transformers'; sleep 10; pkill -KILL -f '[.]venv/bin/flax-transformers'; true" || true
done
