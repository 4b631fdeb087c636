"""A command for the tests of kills: it counts to ten, in functions named as training's are."""

import shutil
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
        print(f"count: resumes from epoch {count.read_text()} of 10")
    train_stage(count, int(count.read_text()))
    (folder / "done").touch()


def train_stage(count, start):
    for number in range(start + 1, 11):
        time.sleep(0.05)
        if number == 4:
            evaluate()
        if number == 8:
            save_checkpoint(count.parent / "seed0/arm/checkpoints")
        write(count, number)


def write(count, number):
    part = count.with_suffix(".part")
    part.write_text(str(number))
    part.replace(count)  # Killed at any moment, one number or the next is there.


def save_checkpoint(folder):
    temporary = folder / "1.orbax-checkpoint-tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    time.sleep(0.1)
    (temporary / "array").touch()
    time.sleep(0.2)
    shutil.rmtree(temporary)


def evaluate():
    time.sleep(0.3)


if __name__ == "__main__":
    main()
