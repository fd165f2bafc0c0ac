"""How long a command takes to start, beside importing torch and Lightning: `python -m benchmarks.startup`.

Each is started anew, in turn, and the least of the seconds is taken: what else runs on the machine only adds to them.
"""

import argparse
import subprocess
import sys
import time

COMMANDS = {
    "import torch, lightning": ["-c", "import torch, lightning"],
    "--help": ["-m", "lora_lightning", "--help"],
    "--version": ["-m", "lora_lightning", "--version"],
    "a mistyped command": ["-m", "lora_lightning", "fitt"],
    "doctor --help": ["-m", "lora_lightning", "doctor", "--help"],
    "merge --help": ["-m", "lora_lightning", "merge", "--help"],
    "fit --help": ["-m", "lora_lightning", "fit", "--help"],
}
LIMIT = 1.5
"""Of `--help`, as a multiple of importing torch and Lightning."""


def seconds(args):
    began = time.perf_counter()
    subprocess.run([sys.executable, *args], capture_output=True, check=False)
    return time.perf_counter() - began


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5)
    times = parser.parse_args().times
    least = dict.fromkeys(COMMANDS, float("inf"))
    for _ in range(times):
        for name, args in COMMANDS.items():
            least[name] = min(least[name], seconds(args))
    base = least["import torch, lightning"]
    print(f"{'least of ' + str(times):<26}{'seconds':>8}{'times the import':>18}")
    for name, taken in least.items():
        print(f"{name:<26}{taken:>8.2f}{taken / base:>18.2f}")
    return int(least["--help"] > LIMIT * base)


if __name__ == "__main__":
    sys.exit(main())
