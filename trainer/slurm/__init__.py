"""Ranks in a Slurm job, started by srun: neither ssh nor MPI nor horovodrun is needed (docs/SLURM.md)."""
