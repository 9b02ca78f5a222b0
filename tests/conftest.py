"""Settings of all tests."""

from hypothesis import settings

# A busy machine is slow, not wrong: how long one example takes says nothing.
settings.register_profile("shardline", deadline=None, print_blob=True)
settings.load_profile("shardline")
