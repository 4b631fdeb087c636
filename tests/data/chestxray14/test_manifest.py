import json

import pytest

from inmerge_jax.data.chestxray14.records import load_chestxray14
from inmerge_jax.errors import UsageError
from inmerge_jax.files import write_json_with_checksum
from tests.data.chestxray14.nih import make


def rewrite(folder, change):
    """The manifest as `change` leaves it."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(split="chexnet"),
        lambda manifest: manifest["full_counts"].update(train=46),
        lambda manifest: manifest.update(content_sha256="0" * 64),
        lambda manifest: manifest.update(seal="0" * 64),
        lambda manifest: manifest.update(format=1),
        lambda manifest: manifest.pop("seal"),
        lambda manifest: manifest.pop("shards"),
    ],
)
def test_a_changed_manifest_is_refused(nih, copy, change):
    rewrite(copy, change)
    message = r"manifest\.json is damaged: its content is not what .*delete .*copy and build"
    with pytest.raises(UsageError, match=message):
        load_chestxray14(copy)
    with pytest.raises(UsageError, match=message):
        make(nih, copy)


@pytest.mark.parametrize("step", range(0, 8))
def test_a_flipped_bit_in_a_json_is_noticed(copy, step):
    records = copy / json.loads((copy / "manifest.json").read_bytes())["records"]
    for path in (copy / "manifest.json", records / "dataset_info.json", records / "features.json"):
        whole = path.read_bytes()
        data = bytearray(whole)
        data[len(data) * (2 * step + 1) // 16] ^= 1 << step
        path.write_bytes(data)
        with pytest.raises(
            UsageError, match=rf"{path.name} is damaged.*: .*build the data set again"
        ):
            load_chestxray14(copy)
        path.write_bytes(whole)
    load_chestxray14(copy)


@pytest.mark.parametrize("data", [b"", b"[]", b"\xff\xfe\x00", b'{"format": 2'])
def test_what_is_no_manifest_is_refused(copy, data):
    (copy / "manifest.json").write_bytes(data)
    with pytest.raises(UsageError, match=r"manifest\.json is damaged"):
        load_chestxray14(copy)


def test_a_manifest_of_another_version_is_refused(copy):
    write_json_with_checksum(copy / "manifest.json", {"format": 3}, "seal")
    with pytest.raises(UsageError, match=r"another version of this program, its format is 3"):
        load_chestxray14(copy)


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
def test_tfds_json_that_is_gone_is_named(nih, copy, name):
    (copy / json.loads((copy / "manifest.json").read_bytes())["records"] / name).unlink()
    with pytest.raises(UsageError, match=rf"{name} is missing; delete .* build the data set again"):
        load_chestxray14(copy)
    with pytest.raises(UsageError, match=rf"{name} is missing"):
        make(nih, copy)
