"""What keeps a run alive and tells of it.

Programs import this package before anything else, because it ends a Python or a system on which they cannot
run in one line. Keep the syntax of this file old.
"""
import sys

if sys.version_info < (3, 11) or sys.platform == "win32":
    need = "needs Python 3.11 or later on Linux or macOS (on Windows: inside WSL 2)"
    have = "this is Python %d.%d on %s, at %s" % (sys.version_info[:2] + (sys.platform, sys.executable))
    print("error: nano-flow-grpo %s; %s" % (need, have), file=sys.stderr)
    sys.exit(2)
