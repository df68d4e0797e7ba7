"""How ranks are started: on nodes by DeepSpeed's launcher, as a Slurm job, by a Kubernetes manifest."""
