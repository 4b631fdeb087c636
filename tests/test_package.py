"""What importing the library costs and brings along."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
HEAVY = ("flax", "torch", "tensorflow", "medmnist", "orbax", "grain", "sklearn", "matplotlib")


def loaded_by(statement):
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_importing_the_core_brings_jax_and_optax_only():
    loaded = loaded_by("import inmerge_jax")
    assert not loaded & set(HEAVY)
    extra = loaded - loaded_by("import jax, optax")
    assert extra == {"inmerge_jax"}


def test_the_public_names():
    import inmerge_jax

    assert set(inmerge_jax.__all__) <= set(dir(inmerge_jax))
    for name in inmerge_jax.__all__:
        # Dataclasses and named tuples without a docstring get their signature as one.
        doc = getattr(inmerge_jax, name).__doc__
        assert doc and not doc.startswith(f"{name}("), name


def requirements():
    text = (ROOT / "requirements.txt").read_text()
    return [Requirement(line) for line in re.findall(r"^\w.*", text, re.MULTILINE)]


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_the_lower_bounds_are_tested_versions():
    extras = project()["optional-dependencies"]
    for text in project()["dependencies"] + extras["train"] + extras["torch"]:
        bound = Requirement(text)
        pins = [str(pin.specifier)[2:] for pin in requirements() if pin.name == bound.name]
        oldest, floor = min(pins, key=Version), str(bound.specifier).removeprefix(">=")
        assert f"{oldest}.".startswith(f"{floor}."), text


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_each_python_has_one_version_of_each_package(python):
    assert f"Programming Language :: Python :: {python}" in project()["classifiers"]
    chosen = [
        pin.name
        for pin in requirements()
        if pin.marker is None or pin.marker.evaluate({"python_version": python})
    ]
    assert sorted(chosen) == sorted({pin.name for pin in requirements()})


def test_neither_the_library_nor_the_experiments_import_tests_and_the_library_no_experiment():
    for folder, forbidden in (("inmerge_jax", "tests|experiments"), ("experiments", "tests")):
        for path in (ROOT / folder).rglob("*.py"):
            found = re.search(rf"^\s*(?:from|import) (?:{forbidden})\b", path.read_text(), re.M)
            assert found is None, f"{path}: {found and found.group()}"
