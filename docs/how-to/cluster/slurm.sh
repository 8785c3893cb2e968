#!/bin/bash
# A round on the nodes of a Slurm job: sbatch --nodes=4 slurm.sh /home/me/study round1.yaml
# The environment with tuner[ray] has to be at the same path on all nodes; the study's folder only on the first.
#SBATCH --job-name=tuner
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
# Five minutes before its time is up, the job saves all trials. Submit it again to resume.
set -euo pipefail
study=$1 round=$2

export RAY_USAGE_STATS_ENABLED=0 RAY_AUTH_MODE=token
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
on_first=(srun --overlap --nodes=1 --ntasks=1 --nodelist="${nodes[0]}")
# The first address of the first node that is not a loopback one. Name the interface here if it is the wrong one.
ip=$("${on_first[@]}" hostname --all-ip-addresses | tr ' ' '\n' | grep -v '^127\.' | head -n 1)
address=$ip:$((20000 + SLURM_JOB_ID % 10000))
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

"${on_first[@]}" ray start --head --node-ip-address="$ip" --port="${address#*:}" --include-dashboard=false --block &
head=$!
until ray health-check --address "$address" 2> /dev/null; do
    kill -0 $head  # ends the job if the head does not start
    sleep 2
done
if ((${#nodes[@]} > 1)); then
    rest=$(IFS=,; echo "${nodes[*]:1}")
    # --no-kill and --kill-on-bad-exit=0: a node that fails takes neither the others nor the round with it.
    # --ntasks: without it Slurm starts as many as the job has nodes, so that one node joins twice.
    num_rest=$((${#nodes[@]} - 1))
    srun --overlap --no-kill --kill-on-bad-exit=0 --nodes=$num_rest --ntasks=$num_rest --nodelist="$rest" \
        ray start --address="$address" --block &
fi

tuner -C "$study" study run "$round" --engine ray --ray-address "$address" &
run=$!
trap 'kill -TERM $run' TERM
code=0
wait $run || code=$?
# A signal ends the first `wait`; the second one is for the trials that are being saved.
if kill -0 $run 2> /dev/null; then code=0; wait $run || code=$?; fi
exit $code
