"""`python -m megatron_mlra.launch`."""

import os
import sys

from megatron_mlra.command_line.output import guard
from megatron_mlra.launch.cli import main

if __name__ == "__main__":
    guard(ending=False)
    code = 1
    try:
        code = main(sys.argv[1:])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    # Not through the interpreter's end: that ends threads, and C++ aborts the whole process, with
    # exit code -6, if one of them is in a request to the hosts' store.
    os._exit(code)
