"""One function in several processes, as a launcher from outside starts them, after one import for all."""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def in_processes(count: int, run: Callable[..., Any], *args: Any, timeout: float = 240) -> list[int]:
    """Fork `count` times and run in each what Lightning takes for ranks 0 and on; returns their exit codes.

    To be called before anything has started threads, as a first backward does; what is not done in time is killed,
    with exit code -9.
    """
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    started = [_forked(rank, run, args, timeout) for rank in range(count)]
    codes: dict[int, int] = {}
    until = time.monotonic() + timeout + 5
    while len(codes) < count and time.monotonic() < until:
        for pid in started:
            if pid not in codes and (done := os.waitpid(pid, os.WNOHANG))[0]:
                codes[pid] = os.waitstatus_to_exitcode(done[1])
        time.sleep(0.02)
    for pid in started:
        if pid not in codes:
            os.kill(pid, 9)
            os.waitpid(pid, 0)
    return [codes.get(pid, -9) for pid in started]


def _forked(rank: int, run: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> int:
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ["LOCAL_RANK"] = str(rank)
        faulthandler.dump_traceback_later(timeout, exit=True)  # says where it hangs
        run(*args)
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
