"""The models in a checkpoint: whole folders, adapters and shards, written, read and put together."""
