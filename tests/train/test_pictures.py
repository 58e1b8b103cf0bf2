"""Pictures of one's own: folders, saved data sets and arrays come in as what they show; everything else is refused in one line."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import MissingExtraError
from fewstep.train.pictures import Pictures, read_pictures


def save(path, array, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8), mode).save(path)
    return path


def flat(value, height=8, width=8, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.full(shape, value)


def test_subfolders_are_classes(tmp_path):
    for name, value in (("cat", 0), ("dog", 255)):
        for i in range(3):
            save(tmp_path / name / f"{i}.png", flat(value))
    save(tmp_path / "dog" / "deeper" / "x.jpg", flat(255))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "empty").mkdir()
    pictures = read_pictures(tmp_path, 4)
    assert (pictures.shape, pictures.classes, len(pictures)) == ((3, 4, 4), ("cat", "dog"), 7)
    batch = pictures[torch.tensor([0, 6])]
    assert batch["label"].tolist() == [0, 1]
    assert batch["x"].dtype is torch.float32
    assert batch["x"][0].unique().tolist() == [-1.0]
    assert batch["x"][1].unique().tolist() == [1.0]
    assert read_pictures(tmp_path, 4, labelled=False)[torch.tensor([0])].keys() == {"x"}
    assert pictures.told() == read_pictures(tmp_path, 4).told()
    save(tmp_path / "cat" / "0.png", flat(1))
    assert pictures.told() != read_pictures(tmp_path, 4).told()


def test_the_middle_square_scaled_mirrored_and_grey(tmp_path):
    wide = np.zeros((4, 12, 3))
    wide[:, 4:6] = 100  # left half of the middle square
    save(tmp_path / "a.png", wide)
    save(tmp_path / "b.png", flat(60, channels=1))
    pictures = read_pictures(tmp_path, 4, mirrored=True)
    assert (pictures.labels, len(pictures), pictures.shape) == (None, 4, (3, 4, 4))
    rows = pictures[torch.arange(4)]["x"]
    assert torch.equal(rows[:2].flip(3), rows[2:])
    torch.testing.assert_close(rows[0, 0, 0], torch.tensor([100, 100, 0, 0]) / 127.5 - 1.0)
    (tmp_path / "a.png").unlink()
    save(tmp_path / "c.png", flat(200, channels=1))
    assert read_pictures(tmp_path, 4).shape == (1, 4, 4)  # all of them are grey


def test_transparency_depth_and_orientation(tmp_path):
    clear = np.zeros((4, 4, 4))
    clear[:2, :, 3] = 255  # black above, nothing below
    save(tmp_path / "1.png", clear, "RGBA")
    deep = Image.fromarray(np.full((4, 4), 128 * 256, np.uint16))
    deep.save(tmp_path / "2.png")
    turned = Image.fromarray(np.concatenate([flat(255, 2, 4), flat(0, 2, 4)]).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "3.png", exif=exif)
    first, second, third = read_pictures(tmp_path, 4).pixels
    assert first[0, :2].unique().tolist() == [0]
    assert first[0, 2:].unique().tolist() == [255]
    assert second.unique().tolist() == [128]
    assert third[0, :2].unique().tolist() == [0]


def test_16_bits_keep_their_brightness_beside_each_other(tmp_path):
    """The mode decides on the scale, not how bright a picture is; for samples that are evaluated, too."""
    from fewstep.cli.evaluate import _pictures

    levels = {"bright": 40000, "dark": 200, "white": 65535}
    for name, level in levels.items():
        Image.fromarray(np.full((8, 8), level, np.uint16)).save(tmp_path / f"{name}.png")
    wanted = [level // 256 for level in levels.values()]
    assert [int(each.unique()) for each in read_pictures(tmp_path, 8).pixels] == wanted
    assert [round(float(each.unique()) * 127.5 + 127.5) for each in _pictures(tmp_path, 8)] == wanted
    floats = tmp_path / "floats"
    floats.mkdir()
    for name, level in {"1": 0.4, "2": 200.0, "3": 300.0}.items():
        Image.fromarray(np.full((8, 8), level, np.float32)).save(floats / f"{name}.tif")
    assert [int(each.unique()) for each in read_pictures(floats, 8).pixels] == [0, 200, 255]


def test_arrays(tmp_path):
    x = np.random.default_rng(0).random((5, 1, 8, 8)) * 2 - 1
    np.savez(tmp_path / "f.npz", x=x, label=np.array([0, 1, 2, 2, 0]))
    pictures = read_pictures(tmp_path / "f.npz", 0)
    assert pictures.classes == ("0", "1", "2")
    np.testing.assert_allclose(pictures[torch.arange(5)]["x"], x, atol=1e-7)
    np.savez(tmp_path / "b.npz", images=np.full((3, 8, 8, 3), 255, np.uint8))
    assert read_pictures(tmp_path / "b.npz", 8)[torch.arange(3)]["x"].shape == (3, 3, 8, 8)


def test_arrays_without_a_value_below_0_are_asked_about(tmp_path):
    np.savez(tmp_path / "f.npz", images=np.random.default_rng(0).random((5, 1, 8, 8)))
    with pytest.warns(UserWarning, match=r"f.npz holds images with no value below 0: is this \[0, 1\]\?") as found:
        assert len(read_pictures(tmp_path / "f.npz", 0)) == 5
    assert "\n" not in str(found[0].message)


@pytest.fixture
def data_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "pic": datasets.Image(), "kind": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {
        "text": ["a"] * 4,
        "pic": [Image.fromarray(flat(60 * i).astype(np.uint8)) for i in range(4)],
        "kind": [0, 1, 1, 0],
    }
    return datasets, datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.filterwarnings("ignore")
def test_a_saved_data_set_is_read_without_network(data_set, tmp_path, monkeypatch):
    datasets, found = data_set
    monkeypatch.setattr("socket.socket.connect", lambda *a: pytest.fail("asked the network"))
    found.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"test": found.select([0]), "train": found}).save_to_disk(str(tmp_path / "parts"))
    for name in ("one", "parts"):
        pictures = read_pictures(tmp_path / name, 4)
        assert pictures.classes == ("no", "yes")
        assert pictures.labels.tolist() == [0, 1, 1, 0]
        assert pictures.pixels[:, 0, 0, 0].tolist() == [0, 60, 120, 180]
    found.remove_columns("pic").save_to_disk(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="no column of pictures; its columns are text"):
        read_pictures(tmp_path / "none", 4)
    found.remove_columns("kind").add_column("label", [5, 0, 1, 2]).save_to_disk(str(tmp_path / "numbers"))
    assert read_pictures(tmp_path / "numbers", 4).classes == ("0", "1", "2", "3", "4", "5")


def test_missing_libraries(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        with pytest.raises(MissingExtraError, match=r"datasets, which is not installed. .*fewstep\[train\]"):
            read_pictures(tmp_path, 4)
    (tmp_path / "state.json").unlink()
    save(tmp_path / "a.png", flat(1))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtraError, match="Pillow"):
        read_pictures(tmp_path, 4)


def empty(path):
    pass


def one(path):
    save(path / "a.png", flat(1))


def mixed(path):
    one(path)
    save(path / "sub" / "a.png", flat(1))


def broken(path):
    one(path)
    (path / "b.png").write_bytes(b"no picture at all")


def cut(path):
    one(path)
    content = save(path / "b.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3))).read_bytes()
    (path / "b.png").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (empty, "holds no pictures"),
        (one, "holds 1 picture; training needs at least 2"),
        (mixed, "Put every picture into a sub-folder"),
        (broken, r"b\.png is no picture that Pillow can read"),
        (cut, r"b\.png is damaged"),
    ],
)
def test_folders_that_are_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        read_pictures(tmp_path, 4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"z": np.zeros((3, 1, 4, 4))}, "no array x, images"),
        ({"x": np.zeros((3, 1, 4, 5))}, "shape"),
        ({"x": np.zeros((3, 1, 4, 4), np.int64)}, "wanted bytes, or floats"),
        ({"x": np.full((3, 1, 4, 4), 255.0)}, "between 255 and 255; floats must lie in"),
        ({"x": np.full((3, 1, 4, 4), np.nan)}, "floats must lie in"),
        ({"x": np.zeros((3, 1, 4, 4)), "label": np.zeros(2, int)}, "one whole number a picture"),
        ({"x": np.zeros((3, 1, 4, 4)), "label": np.array([-1, 0, 1])}, "labels from -1 to 1"),
    ],
)
def test_arrays_that_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_pictures(tmp_path / "a.npz", 0)


def test_other_refusals(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"no \.npz file"):
        read_pictures(tmp_path / "a.npz", 0)
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_pictures(tmp_path / "none", 4)
    np.savez(tmp_path / "b.npz", x=np.zeros((3, 1, 4, 4)))
    with pytest.raises(ValueError, match="4 x 4 pixels, which is the size; got 8"):
        read_pictures(tmp_path / "b.npz", 8)
    assert len(Pictures(torch.zeros(2, 1, 2, 2), None)) == 2
