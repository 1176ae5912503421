"""What `hf-radam average` does: saved checkpoints merged into one model, offline."""
