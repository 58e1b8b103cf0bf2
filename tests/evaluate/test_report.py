from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep as fs
from fewstep.evaluate import Report, compare_plans, image_grid, rms_error


def test_image_grid_places_every_pixel():
    samples = torch.tensor([[0.0, 51.0], [102.0, 255.0]]).reshape(1, 1, 2, 2).repeat(3, 1, 1, 1) / 255
    pixels = np.asarray(Image.open(io.BytesIO(image_grid(samples, (0.0, 1.0), columns=2, scale=1))))
    assert pixels.shape == (5, 5)
    for top, left in ((0, 0), (0, 3), (3, 0)):
        assert pixels[top : top + 2, left : left + 2].tolist() == [[0, 51], [102, 255]]
    assert (pixels[2] == 128).all()
    with pytest.raises(ValueError, match="1 or 3"):
        image_grid(torch.zeros(2, 2), (0.0, 1.0), columns=1)


def test_page_escapes_and_holds_its_pictures(tmp_path):
    report = Report("a <b>", "x & y", {"n": 1})
    report.heading("<h>")
    report.table(["k", "v"], [["<i>", "2"]], best={(0, 1)})
    report.pictures([("p.png", "caption", image_grid(torch.zeros(1, 3, 2, 2), (0.0, 1.0), columns=1))])
    report.write(tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert "<b>" not in page.split("<style>")[0] + page.split("</style>")[1].replace("<body>", "")
    assert "&lt;i&gt;" in page
    assert "class=best" in page
    assert json.loads((tmp_path / "results.json").read_text()) == {"n": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "p.png", "results.json"]


def test_errors_are_against_the_exact_solution():
    exact_model = fs.exact.Gaussian(fs.schedules.VPLinear(), torch.zeros(3), 0.5)
    x = fs.draw_noise((3,), range(8), dtype=torch.float64)
    exact = exact_model.solution(x, 1.0, 1e-3)
    plans = [("ddim", "lambda", fs.make_plan("ddim", exact_model.schedule, n, grid="lambda")) for n in (5, 50)]
    seen = []
    rows = compare_plans(exact_model, x, exact, plans=plans, after=seen.append)
    assert seen == rows
    assert rows[1].error < 0.2 * rows[0].error
    assert rows[0].error == pytest.approx(rms_error(rows[0].samples, exact))
