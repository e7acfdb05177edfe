"""What a full disk does to writes, without filling one."""

import contextlib
import resource


@contextlib.contextmanager
def files_limited_to(size):
    """No file of this process may grow beyond so many bytes: what fits is written, and then nothing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
