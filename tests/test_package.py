"""What importing the library costs and brings along."""

import subprocess
import sys

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
