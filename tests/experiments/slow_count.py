"""A command for the tests of kills: it counts to ten, in functions named as training's are."""

import sys
import time
from pathlib import Path


def main():
    folder, resume = Path(sys.argv[1]), sys.argv[2:] == ["--resume"]
    folder.mkdir(exist_ok=True)
    count = folder / "count"
    if not resume:
        count.write_text("0")
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
        count.write_text(str(number))


def evaluate():
    time.sleep(0.3)


if __name__ == "__main__":
    main()
