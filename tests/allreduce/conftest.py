"""Settings of these tests."""

import os

# torch's store looks up the name of every peer. Where no answer comes it costs a second, and not
# the five that are usual.
os.environ.setdefault("RES_OPTIONS", "timeout:1")
