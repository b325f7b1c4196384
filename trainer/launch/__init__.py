"""How ranks find each other where no launcher of Horovod or torch starts them: under Slurm, or the supervisor."""
