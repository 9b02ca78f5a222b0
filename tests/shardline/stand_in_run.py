"""`shardline run` with a stand-in for the shards: python stand_in_run.py SHARD_SCRIPT RUN_ARGUMENT…

The processes of a test are small, so it need not wait for them as long as for real ones. Which
signals are ignored is for the test to say, in IGNORED_SIGNALS, and not for whoever runs it.
"""

import os
import signal
import sys
from dataclasses import replace

from shardline import cli, launcher, supervision
from shardline.display import Screen
from shardline.local_plan import Launch

shard_script, *arguments = sys.argv[1:]
run_with_real_shards = launcher.run


def run(launch: Launch, screen: Screen) -> int:
    command = (sys.executable, "-u", shard_script)
    return run_with_real_shards(replace(launch, shard_command=command), screen)


signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
for name in os.environ["IGNORED_SIGNALS"].split():
    signal.signal(signal.Signals[name], signal.SIG_IGN)
launcher.run = run
supervision.NOTICE_SECONDS = 0.6  # type: ignore[misc]  # Final for everybody else
supervision.SPARE_SECONDS = 0.3  # type: ignore[misc]  # the same
sys.exit(cli.main(["run", *arguments]))
