"""One shard of the parameters: the state machine, its optimizer and its gRPC service."""
