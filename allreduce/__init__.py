"""The strategy without shards: torch.distributed adds gradients up, every worker updates."""
