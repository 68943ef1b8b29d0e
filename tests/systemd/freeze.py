"""Stop all threads of a process but its main one, as a debugger does, until the process is gone.

    python3 freeze.py PID

A thread that hangs in the kernel, on a disk that does not answer, looks just so from outside.
"""

import ctypes
import os
import sys
from pathlib import Path

PTRACE_ATTACH = 16
ALL_THREADS = 0x40000000  # __WALL

pid = int(sys.argv[1])
libc = ctypes.CDLL(None, use_errno=True)
for task in Path(f"/proc/{pid}/task").iterdir():
    if int(task.name) != pid and libc.ptrace(PTRACE_ATTACH, int(task.name), None, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
while True:
    try:
        os.waitpid(-1, ALL_THREADS)  # a killed thread goes when its tracer has seen it
    except ChildProcessError:
        break
