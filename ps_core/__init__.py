"""The vocabulary that workers and shards share: configuration, plan, wire, errors, metrics."""

__version__ = "0.1.0"
