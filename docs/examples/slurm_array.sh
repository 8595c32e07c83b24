#!/bin/bash
# A cohort split into equal parts: task i of the array predicts every n-th slide. Submit it from the root of the repository:
#   sbatch docs/examples/slurm_array.sh
# To go on with what is left, submit it again. Needs: WORKDIR, SLIDES, OUT on a file system that all nodes share.
#SBATCH --job-name=srcc_jax
#SBATCH --array=1-16
#SBATCH --cpus-per-task=8
#SBATCH --mem=8G
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=predict_%A_%a.log
set -eu

WORKDIR=${WORKDIR:-runs/ws}
SLIDES=${SLIDES:-cohort.csv}
OUT=${OUT:-out}
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1

exec python -m experiments.predict_slides \
    --workdir="$WORKDIR" --slides="$SLIDES" --out="$OUT" \
    --shard="$SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT" \
    --threads="$SLURM_CPUS_PER_TASK" \
    --on_error=skip
