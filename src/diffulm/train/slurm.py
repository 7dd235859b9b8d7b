"""The batch script that starts a recipe on a Slurm cluster, goes on after preemption, and survives a lost node."""

from __future__ import annotations

import math
import re
import shlex

#: Seconds before the end of the job's time at which it is told to stop, at least, and at most (Slurm's 16 bits).
NOTICE, LONGEST_NOTICE = 300, 18 * 3600
#: Of them, seconds that torchrun does not wait for its processes: for the way there, its own end and the requeue.
MARGIN = 60
#: A step and a checkpoint may take so many times as long as planned: MFU and the storage's speed are assumptions.
SLACK = 1.5

_SCRIPT = """\
#!/bin/bash
# Written by `diffulm plan`. Adapt partition, account and modules to the cluster, then: sbatch {file}
# The same job resumes from its newest checkpoint whenever it starts again.
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={per_node}
#SBATCH --exclusive
#SBATCH --time={time}
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# So many seconds before the time is over this script gets SIGTERM. Preemption sends it too, but leaves only what the
# cluster grants (GraceTime, KillWait).
#SBATCH --signal=B:TERM@{notice}
#SBATCH --requeue

set -u
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-8}}
# A store of its own for every restart: in a shared one processes would read the addresses of dead ones.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

# Told to stop: every process writes a checkpoint and ends, then the job is put back. Only here: a run that ends by
# itself, or by an error of its own, stays ended. The signal goes to the processes, for srun would answer it by killing
# them. A job that was cancelled (it is completing) stays so, and a preempted one Slurm has put back already.
stop() {{
    trap '' TERM
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
    scancel --signal=TERM "$SLURM_JOB_ID.0"
    wait
    [ "$state" = COMPLETING ] || scontrol requeue "$SLURM_JOB_ID"
    exit 0
}}
trap stop TERM

# A process that dies is started again, with all others, up to 3 times; it resumes from the checkpoint. Told to stop,
# torchrun waits for the checkpoint before it kills (30 seconds unless told).
srun --kill-on-bad-exit=1 torchrun \\
    --nnodes={nodes} --nproc-per-node={per_node} --max-restarts=3 --shutdown-timeout={timeout} \\
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:29500" \\
    -m diffulm train {recipe} --out {out} &
running=$!
wait "$running"
"""


def slurm_script(
    recipe: str,
    *,
    name: str,
    file: str,
    count: int,
    hours: float | None,
    out: str,
    stopping: float = 0.0,
    gpus_per_node: int = 8,
) -> str:
    """An sbatch script for `count` GPUs.

    `stopping`: seconds that the step under way and a checkpoint take, as planned; where they are many, the job is told
    to stop earlier.

    ValueError when the GPUs do not fill whole nodes, or the job cannot be told so early.
    """
    per_node = min(count, gpus_per_node)
    if count % per_node:
        raise ValueError(f"{count} GPUs do not fill nodes of {per_node}; give --count a multiple of {per_node}")
    timeout = torchrun_waits(stopping)
    notice = timeout + MARGIN
    if notice > LONGEST_NOTICE:
        raise ValueError(
            f"a step and a checkpoint take {stopping / 3600:,.0f} hours; Slurm tells a job to stop at most 18 hours "
            "before its end, so take more GPUs or a smaller train.batch"
        )
    # A fifth more than planned; a day at most, since the job goes on by itself.
    limit = max(min(24, math.ceil((hours or 24) * 1.2) + 1), math.ceil(notice / 3600) + 1)
    return _SCRIPT.format(
        file=shlex.quote(file), name=re.sub(r"[^A-Za-z0-9_.-]", "-", name), nodes=count // per_node, per_node=per_node,
        time=f"{limit:02d}:00:00", notice=notice, timeout=timeout, recipe=shlex.quote(recipe),
        out=shlex.quote(out),
    )  # fmt: skip


def torchrun_waits(stopping: float) -> int:
    """Seconds that torchrun should wait for what takes `stopping` seconds as planned, whole minutes."""
    return max(NOTICE - MARGIN, math.ceil(SLACK * stopping / 60) * 60)
