"""Launchers that start the ranks of training: DeepSpeed's launcher, Slurm jobs, and Kubernetes manifests."""
