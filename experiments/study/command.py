"""The command line of the study."""

import difflib
import inspect
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import jax
import tyro

from experiments.study import archive, datasets, importing, presets, reproduce, runner, stages
from experiments.study.archive import RESULTS
from experiments.study.questions import QUESTIONS
from experiments.study.questions.question import Question
from experiments.study.trials import Trial, with_dependencies
from inmerge_jax.errors import UsageError
from inmerge_jax.files import remove_tree
from inmerge_jax.training.environment import enable_compilation_cache, environment
from inmerge_jax.training.preemption import PreemptionHandler, TrainingInterrupted
from inmerge_jax.training.stage_results import read_result

_WAIT_SECONDS = 20
PROGRAM = "python -m experiments.study"
USAGE = f"""usage: {PROGRAM} COMMAND [options]

questions: {", ".join(QUESTIONS)}
other commands:
  verify     check the stored results and recompute every published table from them
  reproduce  retrain some trials and compare them with the stored ones
  import     add the trials of another folder of results to the stored ones
  presets    train the presets paper and released and compare their merges

{PROGRAM} COMMAND --help lists the options."""


@dataclass(frozen=True)
class StudyConfig:
    """Trains the missing trials of one question, stores them, and prints the answer.

    Each trial has the folder OUTPUT/trials/HASH, named by the hash of its configuration. Trials
    that are finished there or stored in RESULTS are not retrained; interrupted ones are resumed.
    Commands that run at the same time with the same folders share the trials. On a CPU, one command
    per core trains more of them in the same time.

    Attributes:
      data_dir: Folder with medmnist/, nih/ and weights/.
      output: Folder of the runs.
      results: Folder of trials.csv and trials.zip. Choose a new one to train everything.
      data: Data sets to train on, such as breastmnist; default: all of the question.
      models: Networks to train, such as resnet18; default: all of the question.
      seeds: Number of seeds to train; default: all.
      only: Retrain these trials, by hash, and compare them with the stored results.
      minutes: Start no trial after this time.
      cores: CPU cores to run on, by number; default: all.
      dry_run: List the missing trials with a time estimate, and stop.
      analyse: Train nothing; print the answer from the stored trials.
    """

    data_dir: Path = Path("data")
    output: Path = Path("runs/study")
    results: Path = RESULTS
    data: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    models: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    seeds: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HASH ...")] = ()
    minutes: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    cores: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = ()
    dry_run: bool = False
    analyse: bool = False


def main(arguments: Sequence[str]) -> int:
    """Runs one command; returns the exit status, 2 on bad input."""
    commands = {"verify": verify, "reproduce": reproduce.main, "presets": presets.main}
    commands["import"] = importing.main
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    name, *rest = arguments
    try:
        if name in commands:
            return commands[name](rest)
        if name not in QUESTIONS:
            raise UsageError(
                f"{name}: unknown; choose from {', '.join((*QUESTIONS, *sorted(commands)))}"
            )
        return answer(QUESTIONS[name], rest)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def answer(question: Question, arguments: Sequence[str]) -> int:
    """Trains, measures and analyses one question; returns the exit status.

    Raises:
      UsageError: options that name nothing, missing data, or results of other versions.
    """
    description = inspect.cleandoc(StudyConfig.__doc__ or "").split("\n\nAttributes:")[0]
    config = tyro.cli(
        StudyConfig,
        prog=f"{PROGRAM} {question.name}",
        description=f"{question.title} {question.hypothesis}\n\n{description}",
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    if config.cores:
        use_cores(config.cores)
    devices = 1 if config.dry_run or config.analyse else jax.local_device_count()
    paths = stages.Paths(config.data_dir, config.output, config.results, devices)
    trials = chosen(question, config)
    missing = trials if config.only else missing_trials(question, trials, paths)
    if config.dry_run:
        show(missing, archive.read(paths.results), archive.origin(environment()))
        return 0
    diverged: dict[Trial, str] = {}
    if missing and not config.analyse:
        if environment()["git"]["dirty"]:
            print(
                "WARNING: uncommitted changes: `import` refuses trials that are trained now",
                file=sys.stderr,
            )
        if not config.only:
            check_pairs(question, missing, paths)
        enable_compilation_cache()
        minutes = float("inf") if config.minutes is None else config.minutes
        until = time.monotonic() + 60 * minutes
        stop = PreemptionHandler()
        try:
            with stop:
                while missing and time.monotonic() < until:
                    now = runner.run_trials(
                        missing,
                        paths,
                        keep=None if config.only else lambda trial: keep(question, trial, paths),
                        should_stop=stop,
                        until=until,
                    )
                    diverged |= now.diverged
                    if config.only:
                        break
                    if now.diverged:
                        why = {trial.hash: reason for trial, reason in now.diverged.items()}
                        archive.add(paths.results, {}, {}, diverged=why)
                    if now.busy and not now.trained:
                        wait(stop)
                    # Those that follow from what is stored now.
                    before = missing
                    missing = missing_trials(question, chosen(question, config), paths)
                    if missing == before and not now.busy:
                        break
        except TrainingInterrupted as stopped:
            print(f"{stopped}; repeat the command to resume", file=sys.stderr)
            assert stop.signal is not None
            return 128 + stop.signal
    if config.only:
        return compare(trials, paths)
    stored = archive.read(paths.results)
    finished, planned = len(question.stored(stored)), len(question.planned(stored))
    if not finished:
        raise UsageError(
            f"{paths.results} holds no trial of {question.name}, so there is no answer"
        )
    if not question.is_complete(stored):
        print(f"incomplete: {finished} of {planned} trials are stored")
        for shown in (question.choices, question.check):
            if shown is not None:
                print(shown(stored))
    else:
        found = question.analyse(stored)
        effect, count, verdict = question.overview(found)
        print(f"{question.hypothesis}\n\n{question.table(found)}")
        print(f"{effect} ({count} trials): {verdict}")
    for trial, reason in diverged.items():
        print(f"diverged: {trial.name}: {reason}", file=sys.stderr)
    return int(bool(diverged))


def use_cores(cores: Sequence[int]) -> None:
    """Runs this process on some of the CPU's cores; before JAX starts its threads.

    Raises:
      UsageError: the system cannot do so, or has no such core for this process.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise UsageError("--cores: this system does not run a process on some cores; leave it out")
    if wrong := set(cores) - os.sched_getaffinity(0):
        known = " ".join(map(str, sorted(os.sched_getaffinity(0))))
        raise UsageError(f"--cores {min(wrong)}: choose some of {known}")
    os.sched_setaffinity(0, cores)


def wait(stop: PreemptionHandler) -> None:
    """Waits for trials that other processes train.

    Raises:
      TrainingInterrupted: a signal arrived.
    """
    for _ in range(_WAIT_SECONDS):
        if stop():
            raise TrainingInterrupted("stopped while other processes train the remaining trials")
        time.sleep(1)


def chosen(question: Question, config: StudyConfig) -> tuple[Trial, ...]:
    """The trials that the options select.

    Raises:
      UsageError: the question has no trial of such a hash, data set or network.
    """
    stored = archive.read(config.results)
    known = {trial.hash: trial for trial in question.planned(stored)}
    grid = (*question.trials, *question.later(stored))
    has = {
        "data": [trial.backbone.data for trial in grid],
        "models": [trial.backbone.model for trial in grid],
        "only": list(known),
    }
    for option, values in has.items():
        for value in getattr(config, option):
            if value not in values:
                some = (
                    "--dry-run lists them" if option == "only" else ", ".join(dict.fromkeys(values))
                )
                raise UsageError(f"--{option} {value}: not in {question.name}, which has: {some}")
    if config.only:
        return tuple(known[one] for one in config.only)
    # Without all trials of a choice, none follows.
    choices = question.trials if question.choices is not None else ()
    return tuple(
        trial
        for trial in grid
        if (config.seeds is None or trial.backbone.seed < config.seeds or trial in choices)
        and (not config.data or trial.backbone.data in config.data)
        and (not config.models or trial.backbone.model in config.models)
    )


def missing_trials(question: Question, trials: Sequence[Trial], paths: stages.Paths) -> list[Trial]:
    """Trials that are not stored, or whose weights have not been measured, with their backbones."""
    wanted = set(with_dependencies(trials))
    return [trial for trial in question.left(archive.read(paths.results)) if trial in wanted]


def check_pairs(question: Question, missing: Sequence[Trial], paths: stages.Paths) -> None:
    """Checks that no pair would be trained on two kinds of processors, or numbers of cores.

    Raises:
      UsageError: some trials of a backbone are stored and were trained elsewhere.
    """
    stored, here = archive.read(paths.results), archive.origin(environment())
    starts = {trial.backbone for trial in missing if trial.hash not in stored.records}
    for trial in question.stored(stored):
        there = archive.origin(stored.records[trial.hash]["trained"])
        if trial.backbone in starts and there != here:
            raise UsageError(
                f"{paths.results}: {trial.name} was trained on {there}, and others of its backbone "
                f"are missing, which cannot be trained on {here}. Continue on such a machine, or "
                "give a new folder as --results"
            )


def keep(question: Question, trial: Trial, paths: stages.Paths) -> None:
    """Stores a finished trial, and what the question measures of its weights.

    The weights of a second stage are then deleted, unless the question keeps them.
    """
    stored = archive.read(paths.results)
    if trial.hash not in stored.records:
        dataset = stages.plan_of(trial, paths).dataset
        run, scores = paths.trial(trial), question.keeps_scores(trial)
        archive.keep(trial, run, paths.results, dataset, with_scores=scores)
    elif differs(trial, paths):
        # The weights of another training do not belong to the stored scores.
        print(f"WARNING: {trial.hash} {trial.name} differs from the stored one", file=sys.stderr)
        return
    if question.measure is not None and not question.measured(trial, archive.read(paths.results)):
        try:
            question.measure(trial, paths)
        except UsageError as error:
            print(f"not measured: {trial.hash} {trial.name}: {error}", file=sys.stderr)
            return
    if not question.keeps_weights and not trial.is_backbone:
        remove_tree(paths.trial(trial) / "checkpoints")


def show(missing: Sequence[Trial], stored: archive.Archive, here: str) -> None:
    """Prints the missing trials with the time that stored ones suggest.

    Those of the same network on the same data, else on images of the same size; where some were
    trained on such a machine, these alone.

    Args:
      missing: the trials.
      stored: the results.
      here: this machine, of `archive.origin`.
    """

    def kinds(trial: Trial) -> list[tuple[str, str, float]]:
        start = trial.backbone
        size = datasets.SOURCES[start.data].config.size
        return [(where, start.model, start.width) for where in (start.data, f"{size} px")]

    speeds: dict[tuple[str, str, float], dict[bool, list[float]]] = {}
    for record in stored.records.values():
        trial = archive.trial_of(record)
        rate = record["result"]["seconds"] / stages.images_of(trial)
        own = archive.origin(record["trained"]) == here
        for kind in kinds(trial):
            speeds.setdefault(kind, {}).setdefault(own, []).append(rate)
    total = 0.0
    for trial in missing:
        minutes = "unknown"
        if known := [speeds[kind] for kind in kinds(trial) if kind in speeds]:
            rates = known[0].get(True) or known[0][False]
            seconds = stages.images_of(trial) * statistics.median(rates)
            total, minutes = total + seconds, f"{seconds / 60:.1f} min"
        print(f"{trial.hash}  {minutes:>10}  {trial.name}")
    print(f"{len(missing)} trials are missing; those with an estimate take {total / 3600:.1f} h")


def differs(trial: Trial, paths: stages.Paths) -> bool:
    """Whether a finished trial's test AUC or ACC is not the stored one, or it diverged."""
    result = read_result(paths.trial(trial))
    record = archive.read(paths.results).records.get(trial.hash)
    if result is None or record is None:
        return result is None
    return any(result["test"][name] != record["result"]["test"][name] for name in ("auc", "acc"))


def compare(trials: Sequence[Trial], paths: stages.Paths) -> int:
    """Prints the metrics of retrained trials and the stored ones; 1 where they differ."""
    stored = archive.read(paths.results).records
    for trial in trials:
        result, record = read_result(paths.trial(trial)), stored.get(trial.hash)
        print(f"{trial.hash} {trial.name}")
        if result is None:
            print("  diverged, see the warning above")
            continue
        for metric in ("auc", "acc"):
            known = "none" if record is None else f"{record['result']['test'][metric]:.6f}"
            print(f"  test {metric.upper()} {result['test'][metric]:.6f}, stored: {known}")
    return int(any(differs(trial, paths) for trial in trials))


def verify(arguments: Sequence[str]) -> int:
    """Checks the archive's checksums and recomputes the published tables; 1 where one differs.

    Raises:
      UsageError: a file of the archive is not the one that its checksum belongs to.
    """
    from experiments import tables

    if set(arguments) & {"-h", "--help"}:
        print("usage: python -m experiments.study verify\n\n" + (verify.__doc__ or ""))
        return 0
    if arguments:
        raise UsageError(f"{' '.join(arguments)}: verify has no options")
    stored = archive.read()
    wrong = [one for one, record in stored.records.items() if archive.trial_of(record).hash != one]
    print(f"{len(stored.records)} trials, {len(stored.arrays)} arrays: checksums match")
    for one in wrong:
        print(f"{one}: the configuration has another hash")
    different = 0
    for page in tables.PAGES:
        if page in ("README.md", "docs/protocol.md") or page.startswith("docs/results/"):
            old = (tables.ROOT / page).read_text()
            new = tables.render(old, page)
            different += old != new
            print(f"{page}: {'recomputed, equal' if old == new else 'DIFFERENT'}")
            lines = difflib.unified_diff(old.splitlines(), new.splitlines(), lineterm="", n=0)
            print("\n".join(lines), end="")
    return int(bool(different or wrong))
