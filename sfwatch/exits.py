"""Exit statuses, after sysexits.h: what scripts and systemd learn from the end of a command."""

OK = 0
FINDINGS = 1
NOT_RUNNING = 3
USAGE = 64
UNAVAILABLE = 69
INTERNAL = 70
CANNOT_CREATE = 73
TRY_AGAIN = 75
NO_PERMISSION = 77
BAD_CONFIG = 78
