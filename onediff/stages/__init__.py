"""One file per DVC stage: the only place with both I/O and logic. command.py and training.py hold what they share."""
