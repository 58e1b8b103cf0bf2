from __future__ import annotations

import json
import os

import numpy as np
import pytest
from safetensors.numpy import save_file

from fewstep.artefacts import Artefact, json_value, write_atomically
from fewstep.errors import ArtefactError, FewstepError


@pytest.fixture
def artefact():
    return Artefact("demo", {"seed": 3, "name": "ä"}, {"x": np.linspace(0, 1, 7), "n": np.arange(4)})


def test_round_trip_is_exact(artefact, tmp_path):
    artefact.save(tmp_path / "a")
    again = Artefact.load(tmp_path / "a", kind="demo")
    assert again.meta == artefact.meta
    assert again.digest() == artefact.digest()
    for name, array in artefact.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], array)
        assert again.tensors[name].dtype == array.dtype
    assert sorted(os.listdir(tmp_path)) == ["a"]


def forge(path, document, **tensors):
    save_file(
        tensors or {"x": np.zeros(1)}, path, metadata={"fewstep": document if isinstance(document, str) else json.dumps(document)}
    )


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("not json", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ('{"kind": NaN}', "no JSON number"),
        ('{"kind": 1e999}', "out of range"),
        ("[]", "not a fewstep file"),
        ({"kind": "demo"}, "not what fewstep writes"),
        ({"kind": "demo", "format": 1, "meta": {}, "sha256": "", "more": 1}, "not what fewstep writes"),
        ('{"kind": "demo", "kind": "demo"}', "given twice"),
        ({"kind": "other", "format": 1, "meta": {}, "sha256": ""}, "holds a 'other'"),
        ({"kind": "demo", "format": 99, "meta": {}, "sha256": ""}, "reads up to 1"),
        ({"kind": "demo", "format": "1", "meta": {}, "sha256": ""}, "format '1'"),
        ({"kind": "demo", "format": True, "meta": {}, "sha256": ""}, "format True"),
        ({"kind": "demo", "format": 1, "meta": [], "sha256": ""}, "not what fewstep writes"),
        ({"kind": "demo", "format": 1, "meta": {}, "sha256": "0"}, "checksum"),
    ],
)
def test_foreign_and_hostile_headers(document, message, tmp_path):
    forge(tmp_path / "a", document)
    with pytest.raises(ArtefactError, match=message):
        Artefact.load(tmp_path / "a", kind="demo")


def test_foreign_files(tmp_path):
    save_file({"x": np.zeros(1)}, tmp_path / "a")
    with pytest.raises(ArtefactError, match="did not write it"):
        Artefact.load(tmp_path / "a", kind="demo")
    (tmp_path / "b").write_bytes(b"\x80\x04cos\nsystem\n")
    (tmp_path / "c").write_bytes(b"")
    for name in "bc":
        with pytest.raises(ArtefactError, match="truncated, damaged or foreign"):
            Artefact.load(tmp_path / name, kind="demo")
    with pytest.raises(FileNotFoundError):
        Artefact.load(tmp_path / "none", kind="demo")


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"before")

    def fail(*_):
        raise OSError(28, "disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "a", b"after")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"before"


def test_json_values(artefact):
    assert json_value({"a": (np.int64(1), [None, True])}) == {"a": [1, [None, True]]}
    with pytest.raises(TypeError, match="no JSON form"):
        json_value(object())
    with pytest.raises(ValueError, match="not JSON compliant"):
        Artefact("demo", {"x": float("nan")}, {}).digest()
    assert issubclass(ArtefactError, FewstepError)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ArtefactError, match="not a file"):
        Artefact.load(tmp_path, kind="demo")


def test_nothing_beside_the_header(tmp_path):
    Artefact("demo", {}, {"x": np.zeros(1)}).save(tmp_path / "a")
    from safetensors import safe_open

    with safe_open(tmp_path / "a", framework="np") as file:
        metadata = file.metadata()
    save_file({"x": np.zeros(1)}, tmp_path / "b", metadata={**metadata, "more": "1"})
    with pytest.raises(ArtefactError, match="did not write it"):
        Artefact.load(tmp_path / "b", kind="demo")
