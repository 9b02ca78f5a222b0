"""The vocabulary that workers and shards share: configuration, plan, wire, errors, metrics."""

import logging
import os

__version__ = "0.1.0"

# Before anybody imports grpc, whose handlers for fork() can abort the child while a stream is open:
# a DataLoader with workers forks in the middle of training. Its children never speak gRPC.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")

# prometheus_client, when it is imported, puts numbers into files in this folder, and fails where it
# cannot. Such a variable of a web server's environment must not end a training.
_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
if _FOLDER in os.environ and not os.access(os.environ[_FOLDER], os.W_OK):
    logging.getLogger("ps_core").warning(
        "%s is ignored: %s is no folder to write to", _FOLDER, os.environ.pop(_FOLDER)
    )
