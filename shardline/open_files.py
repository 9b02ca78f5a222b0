"""How many files and connections a process may have open at a time."""

import resource
from typing import Final

from ps_core.errors import ConfigError

_OF_ITS_OWN: Final = 24
_PER_PROCESS: Final = 6
"""Its log, its pipe, its ports, and connections to it, in the process that has the most of them."""


def allow_open_files(num_processes: int) -> None:
    """Raise this process's limit, which those that it starts inherit, to what a run of so many
    needs. ConfigError when that is not possible.
    """
    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _OF_ITS_OWN + _PER_PROCESS * num_processes
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return
    if highest != resource.RLIM_INFINITY and highest < needed:
        raise ConfigError(
            f"a run of {num_processes} processes needs about {needed} open files in each, and "
            f"this machine allows {highest}: raise the limit (ulimit -n {needed}), or start fewer"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, highest))
