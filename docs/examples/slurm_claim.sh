#!/bin/bash
# A cohort divided as it goes: each task takes the next slide that nobody holds. Tasks may start late, be preempted or die;
# more may be submitted while others run:
#   sbatch docs/examples/slurm_claim.sh
# Needs: WORKDIR, SLIDES, OUT on a file system that all nodes share.
#SBATCH --job-name=srcc_jax
#SBATCH --array=1-16
#SBATCH --cpus-per-task=8
#SBATCH --mem=8G
#SBATCH --gres=gpu:1
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --output=predict_%A_%a.log
set -eu

WORKDIR=${WORKDIR:-runs/ws}
SLIDES=${SLIDES:-cohort.csv}
OUT=${OUT:-out}
export GLIBC_TUNABLES=glibc.malloc.hugetlb=1

exec python -m experiments.predict_slides \
    --workdir="$WORKDIR" --slides="$SLIDES" --out="$OUT" \
    --claim --lease_seconds=120 \
    --threads="$SLURM_CPUS_PER_TASK" \
    --on_error=skip
