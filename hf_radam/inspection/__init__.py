"""What `hf-radam inspect` finds out and says about checkpoints and runs, by reading alone."""
