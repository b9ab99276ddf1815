"""What serves every paper file: flags, data, tasks, objectives, checkpoints, logs."""
