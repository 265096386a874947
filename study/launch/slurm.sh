#!/usr/bin/env bash
# A study on Slurm: each node of the job runs one Ray node, and the first also runs the command.
#
#     sbatch study/launch/slurm.sh                   run the study below
#     sbatch study/launch/slurm.sh python -V         run another command instead
#
# Cost: the whole allocation counts, nodes × time, from start to end of the job, busy or idle. Few
# nodes for long cost the same as many for a short time; request what the trials can fill.
#
# A job that is preempted, loses a node or reaches its time limit is requeued and resumes the study
# (--resume). `scancel JOB` ends it for good.
#
# Edit: these options, for your site and study.
#SBATCH --job-name=dropout-study
#SBATCH --nodes=2
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --time=12:00:00
##SBATCH --partition=NAME
##SBATCH --account=NAME
#
# Keep these.
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@300
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?start this file with: sbatch study/launch/slurm.sh}"

# Edit: where to find Python on every node (after `uv sync` in a folder that all nodes share) …
export PATH="$PWD/.venv/bin:$PATH"
# … and the study. All nodes must share its storage, too.
command=(
    python run_study.py
    --trials 400
    --address auto
    --storage "$HOME/studies"
    --name slurm-1
    --resume
)
[ $# -eq 0 ] || command=("$@")

# Anyone who reaches an unprotected Ray port can run code as you, and every user of the cluster can.
# So Ray requires a token: new for each job, in a file that only you can read. The nodes get the
# path of the file, since others could see a token in an environment variable or argument.
umask 077
secrets="$HOME/.ray/slurm-$SLURM_JOB_ID"
mkdir -p "$secrets"
python -c 'import secrets; print(secrets.token_hex(32), end="")' > "$secrets/auth_token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$secrets/auth_token"

# Ports specific to this job, since jobs may share a node; Ray picks all other ports.
address="$(python -c 'import ray; print(ray.util.get_node_ip_address())')"
port=$((20000 + SLURM_JOB_ID % 4000 * 3))
# Without this, `auto` could find the Ray cluster of another job on the same node.
export RAY_ADDRESS="$address:$port"
export RAY_TMPDIR="/tmp/ray-$SLURM_JOB_ID"
# When Ray gets the signal to stop, there is nothing left to drain.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0

# One Ray node, run on each Slurm node. The first keeps a core for the command. The dashboard is
# off, which leaves one port less to protect. Ray's client server starts wherever grpc is installed
# (with ray[default]); it requires the token, too.
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
    # Step 0 is Ray. SIGTERM first, so that it removes its files; ending srun would kill it.
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
# Five minutes before the time limit: the study saves its state, and the job is requeued.
trap 'requeue=yes; stop' USR1

# Wait until all nodes have joined: the study then decides how many trials run concurrently.
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
# A trapped signal ends `wait` early; the exit status of the command is what counts.
while kill -0 "$study" 2> /dev/null; do
    status=0
    wait "$study" || status=$?
done

if [ -n "$requeue" ]; then
    echo "slurm.sh: the time is over; job $SLURM_JOB_ID is queued again"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
