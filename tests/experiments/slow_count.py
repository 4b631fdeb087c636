"""A command for the tests of kills: it counts to ten, in functions named as training's are."""

import sys
import time
from pathlib import Path


def main():
    folder, resume = Path(sys.argv[1]), sys.argv[2:] == ["--resume"]
    folder.mkdir(exist_ok=True)
    count = folder / "count"
    if not resume:
        write(count, 0)
    for name in ("config.json", "environment.json"):
        (folder / name).touch()
    if resume:
        print(f"count: goes on from epoch {count.read_text()} of 10")
    train_stage(count, int(count.read_text()))
    (folder / "done").touch()


def train_stage(count, start):
    for number in range(start + 1, 11):
        time.sleep(0.05)
        if number == 4:
            evaluate()
        write(count, number)


def write(count, number):
    part = count.with_suffix(".part")
    part.write_text(str(number))
    part.replace(count)  # Killed at any moment, one number or the next is there.


def evaluate():
    time.sleep(0.3)


if __name__ == "__main__":
    main()
