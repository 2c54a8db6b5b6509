"""What Jupyter starts as a kernel in the tests: it asks `lesson_server.py` to fork one.

Called with the kernel's connection file, it stays as long as the kernel does and ends with its
status, so that whoever started it sees a kernel as always, only one that need not import anything.
"""

import json
import os
import signal
import socket
import sys


def main(connection_file: str) -> int:
    # Jupyter interrupts a kernel before it asks it to end, and then waits for this process
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ["MMEMO_LESSON_SERVER"])
        request = {
            "connection_file": connection_file,
            "environment": dict(os.environ),
            "folder": os.getcwd(),
        }
        server.sendall(json.dumps(request).encode() + b"\n")
        with server.makefile() as replies:
            ended = json.loads(replies.readline() or '{"status": 1, "cpu": 0}')
    with open(os.environ["MMEMO_KERNEL_CPU"], "a") as file:
        print(ended["cpu"], file=file)
    return ended["status"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
