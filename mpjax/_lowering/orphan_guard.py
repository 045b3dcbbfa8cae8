"""Runs a command for as long as the caller lives; leaves no directory of an orphan.

    python -P orphan_guard.py directory command...

Standard input stays open while the caller lives, whichever way that ends. Then the
command is killed and, after it, what it has written is removed.
"""

import os
import shutil
import subprocess
import sys
import threading


def main(directory: str, *command: str) -> int:
    """Returns the command's exit status; of a signal, 128 and its number."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    orphaned = threading.Event()

    def listen() -> None:
        os.read(sys.stdin.fileno(), 1)
        orphaned.set()
        child.kill()

    threading.Thread(target=listen, daemon=True).start()
    status = child.wait()
    if orphaned.is_set():
        shutil.rmtree(directory, ignore_errors=True)
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
