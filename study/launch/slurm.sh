#!/usr/bin/env bash
# A study on Slurm: each node of the job runs one Ray node, and the first one the command too.
#
#     sbatch study/launch/slurm.sh                   the study below
#     sbatch study/launch/slurm.sh python -V         another command, in the same Ray cluster
#
# Cost: the whole allocation counts, nodes × time, from the job's first second to its last, however
# busy it is. A few nodes for long cost the same as many for short; ask for what the trials fill.
#
# A job that is preempted, that loses a node, or whose time is over is queued again and goes on
# (--resume). `scancel JOB` ends it for good.
#
# Edit: these options, for your site and your patience.
#SBATCH --job-name=dropout-study
#SBATCH --nodes=2
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
##SBATCH --partition=NAME
##SBATCH --account=NAME
#
# Leave these.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@300
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this file with: sbatch study/launch/slurm.sh}"

# Edit: how Python is found on every node (README: `uv sync` in a folder that all nodes share) …
export PATH="$PWD/.venv/bin:$PATH"
# … and the study. Its storage has to be shared as well.
command=(
    python run_study.py
    --trials 400
    --address auto
    --storage "$HOME/studies"
    --name slurm-1
    --resume
)
[ $# -eq 0 ] || command=("$@")

# Whoever reaches an unprotected Ray port runs code as you, and every user of the cluster can reach
# it. So Ray asks for a token: new for each job, in a file that only you can read. The nodes are
# given the file's name; in an environment or an argument the token could be seen by others.
umask 077
secrets="$HOME/.ray/slurm-$SLURM_JOB_ID"
mkdir -p "$secrets"
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$secrets/auth_token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$secrets/auth_token"

# Ports of the job's own, since jobs may share a node; all other ports are taken where free.
address="$(python -c 'import ray; print(ray.util.get_node_ip_address())')"
port=$((20000 + SLURM_JOB_ID % 4000 * 3))
# The address of this job's Ray: `auto` alone would take another's that runs on the same node.
export RAY_ADDRESS="$address:$port"
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"
# When Ray is told to stop, nothing is left that it could wait for.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

# One Ray node, run on each Slurm node. The first keeps a core for the command. There is no
# dashboard: what does not listen needs no guard. Ray's client server starts wherever grpc is installed (with
# ray[default]); it asks for the token too.
# shellcheck disable=SC2016  # expanded on each node
node='
    cores=$SLURM_CPUS_PER_TASK
    options=(--num-gpus="${SLURM_GPUS_ON_NODE:-0}" --min-worker-port=0 --max-worker-port=0
        --dashboard-agent-listen-port=0 --disable-usage-stats --block)
    if [ "$SLURM_NODEID" = 0 ]; then
        [ "$cores" = 1 ] || cores=$((cores - 1))
        options+=(--head --node-ip-address="${RAY_ADDRESS%:*}" --port="${RAY_ADDRESS##*:}"
            --temp-dir="$RAY_TMPDIR" --include-dashboard=false --dashboard-host=127.0.0.1
            --dashboard-port=$((${RAY_ADDRESS##*:} + 1)))
        python -c "import grpc" 2> /dev/null &&
            options+=(--ray-client-server-port=$((${RAY_ADDRESS##*:} + 2)))
    else
        options+=(--address="$RAY_ADDRESS")
    fi
    unset RAY_ADDRESS
    ray start --num-cpus="$cores" "${options[@]}" &
    trap "kill $! 2> /dev/null" TERM
    wait $! || wait $! || true
    rm -rf "$RAY_TMPDIR"
'
srun --export=ALL bash -c "$node" > "$secrets/ray.log" 2>&1 &
ray=$!

study="" requeue=""
# shellcheck disable=SC2329  # called by the trap
end() {
    # Step 0 is Ray. It is asked first, so that it takes its files along; srun itself would kill it.
    scancel --quiet --signal=TERM "$SLURM_JOB_ID.0" || true
    for _ in {1..20}; do kill -0 "$ray" 2> /dev/null && sleep 1; done
    kill "$ray" 2> /dev/null || true
    rm -rf "$secrets"
}
# shellcheck disable=SC2329  # called by the traps
stop() {
    [ -z "$study" ] || kill -TERM "$study" 2> /dev/null || true
}
trap end EXIT
trap stop TERM INT
# Five minutes before the time is over: the study saves what it has, and the job queues up again.
trap 'requeue=yes; stop' USR1

# Waits until all nodes are there: by what it finds then, the study decides how much runs at once.
cat > "$secrets/wait.py" << 'PYTHON'
import logging
import os
import sys
import time

import ray

wanted, until = int(os.environ["SLURM_JOB_NUM_NODES"]), time.monotonic() + 300
while True:
    try:
        ray.init("auto", log_to_driver=False, logging_level=logging.CRITICAL)
        break
    except Exception as error:
        if time.monotonic() > until:
            sys.exit(f"slurm.sh: Ray did not start: {error}")
        time.sleep(1)
while (there := sum(node["Alive"] for node in ray.nodes())) < wanted and time.monotonic() < until:
    time.sleep(1)
have = ray.cluster_resources()
print(
    f"slurm.sh: Ray at {os.environ['RAY_ADDRESS']} on {there} of {wanted} nodes:"
    f" {have.get('CPU', 0):g} cores, {have.get('GPU', 0):g} GPUs",
    flush=True,
)
PYTHON
if ! python "$secrets/wait.py"; then
    cat "$secrets/ray.log"
    exit 1
fi

"${command[@]}" &
study=$!
status=0
# A trapped signal ends `wait` early; what counts is how the command ends.
while kill -0 "$study" 2> /dev/null; do
    status=0
    wait "$study" || status=$?
done

if [ -n "$requeue" ]; then
    echo "slurm.sh: the time is over; job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
