"""The batch script that starts a recipe on a Slurm cluster, goes on after preemption, and survives a lost node."""

from __future__ import annotations

import math
import re
import shlex

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
# Five minutes before the time is over the batch shell gets SIGTERM; preemption sends the same.
#SBATCH --signal=B:TERM@300
#SBATCH --requeue

set -u
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-8}}

# torchrun passes SIGTERM on; each process writes a checkpoint and ends with 143. Then this job is put back.
stop() {{
    kill -TERM "$running"
    wait "$running"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}}
trap stop TERM

# A process that dies is started again, with all others, up to 3 times; it resumes from the checkpoint.
srun --kill-on-bad-exit=1 torchrun \\
    --nnodes={nodes} --nproc-per-node={per_node} --max-restarts=3 \\
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$head:29500" \\
    -m diffulm train {recipe} --out {out} &
running=$!
wait "$running"
"""


def slurm_script(
    recipe: str, *, name: str, file: str, count: int, hours: float | None, out: str, gpus_per_node: int = 8
) -> str:
    """An sbatch script for `count` GPUs. ValueError when they do not fill whole nodes."""
    per_node = min(count, gpus_per_node)
    if count % per_node:
        raise ValueError(f"{count} GPUs do not fill nodes of {per_node}; give --count a multiple of {per_node}")
    # A fifth more than planned; a day at most, since the job goes on by itself.
    limit = min(24, math.ceil((hours or 24) * 1.2) + 1)
    return _SCRIPT.format(
        file=shlex.quote(file), name=re.sub(r"[^A-Za-z0-9_.-]", "-", name), nodes=count // per_node, per_node=per_node,
        time=f"{limit:02d}:00:00", recipe=shlex.quote(recipe), out=shlex.quote(out),
    )  # fmt: skip
