"""The vocabulary that workers and shards share: configuration, plan, wire, errors, metrics."""

import os

__version__ = "0.1.0"

# Before anybody imports grpc, whose handlers for fork() can abort the child while a stream is open:
# a DataLoader with workers forks in the middle of training. Its children never speak gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
