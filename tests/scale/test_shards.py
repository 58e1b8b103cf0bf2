from __future__ import annotations

import gc
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scale.toy import MIXTURE, PLAN, SCHEDULE, Toy, toy

import fewstep as fs
from fewstep.errors import ArtefactError
from fewstep.scale import Job, LocalEngine, Opened, read_shards, sample_shards, shards
from fewstep.scale.members import Drawn, encoded
from fewstep.scale.run import Tally


class Stopped(Exception):
    pass


class Stopping:
    """Draws in an order of its own, and stops."""

    def __init__(self, order, after):
        self.order, self.after = order, after

    def run(self, job, drawer, blocks, keep):
        for k, block in enumerate(sorted(blocks, key=self.order)):
            if k == self.after:
                raise Stopped
            keep(block, drawer(block))
        return Tally()


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_samples_are_those_of_fewstep_sample_block_by_block(tmp_path):
    job = toy(50, block=8)
    summary = sample_shards(job, tmp_path / "a", blocks_per_shard=3)
    samples, about = read_shards(tmp_path / "a")
    noise = fs.draw_noise((2,), range(50), PLAN)
    expected = torch.cat([fs.sample(MIXTURE, noise[k : k + 8], PLAN) for k in range(0, 50, 8)])
    assert torch.equal(torch.from_numpy(samples), expected)
    assert about[49] == {"index": 49, "seed": 49, "label": 1}
    assert (summary.samples, summary.drawn, list(summary.checksums)) == (50, 50, [f"samples-00000{k}.tar" for k in range(3)])
    for name, digest in summary.checksums.items():
        assert hashlib.sha256((tmp_path / "a" / name).read_bytes()).hexdigest() == digest
    assert sorted(content(tmp_path / "a")) == [".lock", "plan.safetensors", *summary.checksums, "shards.json"]


def test_a_stochastic_plan_depends_on_the_seed_of_a_sample_alone(tmp_path):
    plan = fs.make_plan("ddpm", SCHEDULE, 4)
    sample_shards(toy(plan=plan, seeds=[5, 3, 8], block=2), tmp_path / "a")
    sample_shards(toy(plan=plan, seeds=[8, 5], block=2), tmp_path / "b")
    first, second = read_shards(tmp_path / "a")[0], read_shards(tmp_path / "b")[0]
    assert np.allclose(first[[2, 0]], second, rtol=0, atol=1e-6)


@pytest.mark.parametrize("after", [0, 1, 4, 6])
def test_a_run_that_stopped_anywhere_goes_on_to_the_same_bytes(tmp_path, after):
    job = toy(50, block=8)
    sample_shards(job, tmp_path / "whole", blocks_per_shard=3)
    with pytest.raises(Stopped):
        sample_shards(job, tmp_path / "parts", blocks_per_shard=3, engine=Stopping(lambda b: -b, after))
    counts = []
    summary = sample_shards(job, tmp_path / "parts", blocks_per_shard=3, after=counts.append)
    assert summary.drawn == 50 - counts[0]
    assert counts[0] == {0: 0, 1: 2, 4: 26, 6: 42}[after]
    assert counts[-1] == 50
    assert content(tmp_path / "parts") == content(tmp_path / "whole")
    again = sample_shards(job, tmp_path / "parts", blocks_per_shard=3)
    assert (again.drawn, again.checksums) == (0, summary.checksums)


def test_a_process_that_is_killed_while_it_writes_leaves_a_set_that_goes_on(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from scale.toy import toy; from fewstep.scale import sample_shards\n"
        "import os, signal\n"
        "sample_shards(toy(400, block=2), sys.argv[2], after=lambda n: n >= 150 and os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parents[1]), str(tmp_path / "a")], check=False)
    assert done.returncode == -signal.SIGKILL
    summary = sample_shards(toy(400, block=2), tmp_path / "a")
    assert summary.drawn == 250
    sample_shards(toy(400, block=2), tmp_path / "b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_damaged_shards_and_blocks_are_made_again(tmp_path):
    job = toy(50, block=8)
    whole = sample_shards(job, tmp_path / "a", blocks_per_shard=3)
    path = tmp_path / "a" / "samples-000001.tar"
    path.write_bytes(path.read_bytes()[:-600] + b"x" * 600)
    with pytest.raises(ArtefactError, match=r"samples-000001\.tar is not what shards\.json says"):
        read_shards(tmp_path / "a")
    mended = sample_shards(job, tmp_path / "a", blocks_per_shard=3)
    assert (mended.damaged, mended.drawn, mended.checksums) == (("samples-000001.tar",), 24, whole.checksums)
    with pytest.raises(Stopped):
        sample_shards(job, tmp_path / "b", blocks_per_shard=3, engine=Stopping(lambda b: b, 2))
    kept = sorted((tmp_path / "b" / ".blocks").glob("*.tar"))
    kept[0].write_bytes(b"")
    assert sample_shards(job, tmp_path / "b", blocks_per_shard=3).drawn == 42
    assert content(tmp_path / "a") == content(tmp_path / "b")


class Elsewhere:
    """A machine that rounds otherwise: a bit of every sample differs."""

    def run(self, job, drawer, blocks, keep):
        for block in blocks:
            drawn = bytearray(drawer(block))
            drawn[drawn.find(b"NUMPY") + 128] ^= 1
            keep(block, bytes(drawn))
        return Tally()


def test_a_damaged_shard_is_made_again_as_it_was_or_not_at_all(tmp_path):
    job, folder = toy(50, block=8), tmp_path / "a"
    whole = sample_shards(job, folder, blocks_per_shard=3)
    before = content(folder)
    path = folder / "samples-000001.tar"
    path.write_bytes(path.read_bytes()[:-600] + b"x" * 600)
    damaged = path.read_bytes()
    for _ in range(2):
        with pytest.raises(ArtefactError, match=r"samples-000001\.tar was made again and is not what"):
            sample_shards(job, folder, blocks_per_shard=3, engine=Elsewhere())
        assert path.read_bytes() == damaged
        assert not list((folder / ".blocks").iterdir())
        with pytest.raises(ArtefactError, match=r"not complete: it has 26 of 50 samples, the first 24 without a gap"):
            read_shards(folder)
    mended = sample_shards(job, folder, blocks_per_shard=3)
    assert (mended.damaged, mended.drawn, mended.checksums) == (("samples-000001.tar",), 24, whole.checksums)
    assert content(folder) == before


def test_a_damaged_shard_that_was_put_back_is_taken_as_it_is(tmp_path):
    job, path = toy(50, block=8), tmp_path / "a" / "samples-000001.tar"
    sample_shards(job, tmp_path / "a", blocks_per_shard=3)
    whole = path.read_bytes()
    path.unlink()
    with pytest.raises(ArtefactError, match="was made again"):
        sample_shards(job, tmp_path / "a", blocks_per_shard=3, engine=Elsewhere())
    path.write_bytes(whole)
    assert sample_shards(job, tmp_path / "a", blocks_per_shard=3).drawn == 0


def test_the_plan_beside_the_samples_is_theirs(tmp_path):
    path = tmp_path / "a" / "plan.safetensors"
    sample_shards(toy(), tmp_path / "a")
    whole = path.read_bytes()
    for wrong in (lambda: path.write_bytes(b"x"), lambda: fs.make_plan("ddim", SCHEDULE, 3).save(path), path.unlink):
        wrong()
        sample_shards(toy(), tmp_path / "a")
        assert path.read_bytes() == whole


def test_what_a_killed_run_was_writing_goes_and_nothing_else(tmp_path):
    with pytest.raises(Stopped):
        sample_shards(toy(), tmp_path / "a", engine=Stopping(lambda b: b, 3))
    rest = [
        ".samples-000000.tar.12.0123abcd.tmp",
        ".shards.json.12.0123abcd.tmp",
        f".blocks/.000000004-{'0' * 64}.tar.12.0123abcd.tmp",
    ]
    for name in (*rest, ".mine.tmp"):
        (tmp_path / "a" / name).write_bytes(b"x")
    with pytest.raises(Stopped):
        sample_shards(toy(), tmp_path / "a", engine=Stopping(lambda b: b, 0))
    assert [name for name in (*rest, ".mine.tmp") if (tmp_path / "a" / name).exists()] == [".mine.tmp"]


def test_seeds_of_any_size_are_kept_apart(tmp_path):
    for k, seeds in enumerate(([2**63], [2**63, 5], [2**64 + 5, 5])):
        sample_shards(toy(seeds=seeds), tmp_path / f"{k}")
        samples, about = read_shards(tmp_path / f"{k}")
        assert [told["seed"] for told in about] == seeds
        assert len(np.unique(samples[:, 0])) == len(seeds)
    with pytest.raises(ArtefactError, match="with seeds sha256"):
        sample_shards(toy(seeds=[2**63, 6]), tmp_path / "1")


def test_a_set_that_is_not_complete_is_read_only_if_that_is_asked_for(tmp_path):
    folder = tmp_path / "a"
    with pytest.raises(Stopped):
        sample_shards(toy(50), folder, blocks_per_shard=2, engine=Stopping(lambda b: b, 2))  # the first of four
    with pytest.raises(ArtefactError, match=r"it has 16 of 50 samples, the first 16 without a gap\. Repeat .* count of at most 16"):
        read_shards(folder)
    with pytest.raises(ArtefactError, match="not complete"):
        read_shards(folder, 17)
    assert len(read_shards(folder, 16)[0]) == len(read_shards(folder, partial=True)[0]) == 16
    with pytest.raises(Stopped):
        sample_shards(toy(50), tmp_path / "b", blocks_per_shard=2, engine=Stopping(lambda b: -b, 3))  # the last two
    with pytest.raises(ArtefactError, match="it has 18 of 50 samples, the first 0 without a gap"):
        read_shards(tmp_path / "b", 1)
    assert [told["index"] for told in read_shards(tmp_path / "b", 2, partial=True)[1]] == [32, 33]
    with pytest.raises(ValueError, match="count must be at least 1"):
        read_shards(folder, 0)


def test_a_set_of_something_else_is_refused_with_both_named(tmp_path):
    sample_shards(toy(20), tmp_path / "a")
    other = fs.make_plan("ddim", SCHEDULE, 5)
    wanted = {
        f"plan {PLAN.digest[:16]}, and this run has {other.digest[:16]}": toy(20, plan=other),
        "samples 20, and this run has 21": toy(21),
        "seeds first 0, and this run has first 1": toy(seeds=range(1, 21)),
        "block 8, and this run has 4": toy(20, block=4),
        "threads 1, and this run has 2": toy(20, threads=2),
        "told label None, and this run has label 3": toy(20, label=3),
    }
    for told, job in wanted.items():
        with pytest.raises(ArtefactError) as error:
            sample_shards(job, tmp_path / "a")
        assert told in str(error.value), told
    exact = fs.exact.Gaussian(SCHEDULE, [0.0, 0.0], 1.0)
    model = Job(lambda: Opened(exact), PLAN, (2,), range(20), block=8)
    with pytest.raises(ArtefactError, match=r"model fingerprint .*, name GaussianMixture, and this run has .*name Gaussian"):
        sample_shards(model, tmp_path / "a")


def test_foreign_folders_and_manifests_are_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ArtefactError, match="holds other files"):
        sample_shards(toy(), tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="no folder"):
        sample_shards(toy(), tmp_path / "none" / "a")
    sample_shards(toy(), tmp_path / "a")
    document = json.loads((tmp_path / "a" / "shards.json").read_text())
    for text in ("{", "[]", json.dumps({**document, "format": 99}), json.dumps({**document, "kind": "x"})):
        (tmp_path / "a" / "shards.json").write_text(text)
        with pytest.raises(ArtefactError, match=r"shards\.json"):
            sample_shards(toy(), tmp_path / "a")


def test_shards_that_are_missing_or_misnamed_are_told_as_such(tmp_path):
    folder = tmp_path / "a"
    sample_shards(toy(50), folder, blocks_per_shard=3)
    (folder / "samples-000001.tar").unlink()
    with pytest.raises(ArtefactError, match=r"samples-000001\.tar is missing: repeat the command"):
        read_shards(folder)
    document = json.loads((folder / "shards.json").read_text())
    first = document["shards"][0]
    others = [{**first, "name": name} for name in ("samples-x.tar", "../samples-000000.tar", "samples-000099.tar", 7)]
    for wrong in (*others, {**first, "sha256": None}, document["shards"][1]):
        (folder / "shards.json").write_text(json.dumps({**document, "shards": [wrong, *document["shards"][1:]]}))
        with pytest.raises(ArtefactError, match=r"shards\.json"):
            sample_shards(toy(50), folder, blocks_per_shard=3)
    (folder / "shards.json").write_text(json.dumps({**document, "shards": [*document["shards"], others[2]]}))
    with pytest.raises(ArtefactError, match="lists more than the 3 shards"):
        sample_shards(toy(50), folder, blocks_per_shard=3)


def test_a_run_that_starts_in_the_middle_of_a_shard_of_another_changes_nothing(tmp_path):
    pytest.importorskip("fcntl")
    folder = tmp_path / "a"

    def files():
        return {path: (path.stat().st_ino, path.stat().st_size) for path in folder.rglob("*")}

    class Nested:
        def run(self, job, drawer, blocks, keep):
            for block in blocks:
                before = files()
                with pytest.raises(ArtefactError, match="another run writes into"):
                    sample_shards(job, folder, blocks_per_shard=3)
                assert files() == before
                keep(block, drawer(block))
            return Tally()

    summary = sample_shards(toy(50), folder, blocks_per_shard=3, engine=Nested())
    assert sample_shards(toy(50), tmp_path / "b", blocks_per_shard=3).checksums == summary.checksums


def test_a_run_that_starts_while_another_joins_a_shard_takes_no_blocks_from_it(tmp_path, monkeypatch):
    pytest.importorskip("fcntl")
    joined, tried = shards._joined, []

    def joining(*given):
        if not tried:
            tried.append(given)
            with pytest.raises(ArtefactError, match="another run writes into"):
                sample_shards(toy(50), tmp_path / "a", blocks_per_shard=3)
        return joined(*given)

    monkeypatch.setattr(shards, "_joined", joining)
    assert sample_shards(toy(50), tmp_path / "a", blocks_per_shard=3).drawn == 50
    assert len(read_shards(tmp_path / "a")[0]) == 50
    assert tried


def test_two_runs_do_not_write_into_one_folder_at_a_time(tmp_path):
    pytest.importorskip("fcntl")

    class Nested:
        def run(self, job, drawer, blocks, keep):
            with pytest.raises(ArtefactError, match="another run writes into"):
                sample_shards(job, tmp_path / "a")
            return LocalEngine().run(job, drawer, blocks, keep)

    assert sample_shards(toy(), tmp_path / "a", engine=Nested()).samples == 50


def test_threads_are_fixed_while_drawing_and_given_back(tmp_path):
    seen = []

    class Watching(Toy):
        def conditions(self, rows):
            seen.append(torch.get_num_threads())
            return {}

    before = torch.get_num_threads()
    sample_shards(toy(20, threads=2, opened=Watching()), tmp_path / "a")
    assert set(seen) == {2}
    assert torch.get_num_threads() == before


def test_members_are_those_of_the_tar_library_and_pictures_those_of_pillow():
    image = pytest.importorskip("PIL.Image")
    values = np.linspace(-1.2, 1.2, 2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    content = encoded(Drawn(range(7, 9), values, [{"index": i} for i in (7, 8)], data_range=(-1.0, 1.0)))
    with tarfile.open(fileobj=io.BytesIO(content + bytes(1024))) as archive:
        names = archive.getnames()
        picture = np.asarray(image.open(archive.extractfile("00000008.png")))
    assert names == [f"0000000{i}.{kind}" for i in (7, 8) for kind in ("npy", "png", "json")]
    expected = np.rint(127.5 * (np.clip(values[1].astype(np.float64), -1, 1) + 1)).astype(np.uint8)
    assert np.array_equal(picture, expected.transpose(1, 2, 0))


def pictures(tmp_path: Path) -> Path:
    exact = fs.exact.Gaussian(SCHEDULE, [0.0] * 64, 0.3)

    def denoiser(x, t):
        return exact(x.flatten(1), t).reshape(x.shape)

    wrapped = fs.Denoiser(denoiser, SCHEDULE, predicts="data")
    sample_shards(Job(lambda: Opened(wrapped, data_range=(-1.0, 1.0)), PLAN, (1, 8, 8), range(10), block=4), tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves files open
def test_webdataset_reads_the_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    folder = pictures(tmp_path)
    rows = list(webdataset.WebDataset(str(folder / "samples-000000.tar"), shardshuffle=False).decode())
    gc.collect()
    arrays = read_shards(folder)[0]
    assert [row["__key__"] for row in rows] == [f"{i:08d}" for i in range(10)]
    assert np.array_equal(np.stack([row["npy"] for row in rows]), arrays)
    assert rows[3]["json"] == {"index": 3, "seed": 3}


def test_datasets_reads_the_shards(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = pictures(tmp_path)
    rows = datasets.load_dataset("webdataset", data_files=str(folder / "*.tar"), split="train", streaming=True)
    rows = list(rows)
    arrays = read_shards(folder)[0]
    assert np.array_equal(np.stack([np.asarray(row["npy"], np.float32).reshape(1, 8, 8) for row in rows]), arrays)
    assert rows[3]["json"]["seed"] == 3
    assert rows[3]["png"].size == (8, 8)


def test_a_model_that_samples_latents_gives_pictures_and_keeps_the_latents(tmp_path):
    def opened():
        return Opened(MIXTURE, decode=lambda x: 2.0 * x)

    sample_shards(Job(opened, PLAN, (2,), range(3), block=2), tmp_path / "a")
    with tarfile.open(tmp_path / "a" / "samples-000000.tar") as archive:
        names = archive.getnames()
        latents, samples = (np.load(io.BytesIO(archive.extractfile(f"00000001.{kind}").read())) for kind in ("latents.npy", "npy"))
    assert names[:3] == ["00000000.npy", "00000000.latents.npy", "00000000.json"]
    assert np.array_equal(samples, 2.0 * latents)


def test_a_job_without_seeds_is_refused():
    with pytest.raises(ValueError, match="needs seeds"):
        toy(seeds=range(5, 5) or [], count=0)


def test_only_our_own_process_is_ended_by_the_toy():
    assert Toy(deadly=0).alive == os.getpid()
