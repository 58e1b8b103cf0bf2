"""The README: its table is the one that the benchmark results give, and its examples in Python at least parse."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("readme_table", ROOT / "tools" / "readme_table.py")
readme_table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme_table)

START, END = "<!-- results:start -->", "<!-- results:end -->"
README = f"before\n{START}\nold\n{END}\nafter\n"
RESULT = {
    "command": "make bench",
    "machine": "2 cores",
    "seed": 0,
    "rows": [
        {"model": "digits", "solver": "ddim", "grid": "time", "nfe": 4, "error": 0.5},
        {"model": "digits", "solver": "ddim", "grid": "time", "nfe": 8, "error": 0.25},
        {"model": "digits", "solver": "dpmpp_2m", "grid": "time", "nfe": 8, "error": 0.0123456},
        {"model": "mixture", "solver": "ddim", "grid": "time", "nfe": 8, "error": None},
    ],
}


def test_readme_is_up_to_date():
    if not list((ROOT / "benchmarks" / "results").glob("*.json")):
        pytest.skip("no results yet")
    assert readme_table.main(["--check"]) == 0


def test_tables():
    text = readme_table.replace(README, {"solvers": RESULT, "other": {"seed": 0}})
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| `ddim` | `time` | **0.5** | 0.25 |" in text
    assert "| `dpmpp_2m` | `time` | – | **0.0123** |" in text
    assert "**mixture**" in text
    assert readme_table.replace(text, {"solvers": RESULT}) == text


def test_some_solvers_and_some_calls():
    page = README.replace("start", "start solvers=dpmpp_2m")
    text = readme_table.replace(page, {"solvers": {**RESULT, "shown": [8]}})
    assert "dpmpp_2m` | `time` | **0.0123** |" in text
    assert "`ddim`" not in text
    assert "4 calls" not in text


def test_write_then_check(tmp_path, capsys):
    (tmp_path / "README.md").write_text(README)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "solvers.json").write_text(json.dumps(RESULT))
    root = ["--root", str(tmp_path)]
    assert readme_table.main(["--check", *root]) == 1
    assert "not up to date" in capsys.readouterr().out
    assert readme_table.main(root) == 0
    assert readme_table.main(["--check", *root]) == 0


@pytest.mark.parametrize("page", [END + START, README + START, START + END.replace("results", "models")])
def test_every_start_has_its_end(page):
    with pytest.raises(ValueError, match="needs its end"):
        readme_table.replace(page, {"solvers": RESULT})


def test_python_in_the_pages_parses():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    blocks = [block for page in pages for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)]
    assert len(blocks) > 5
    for block in blocks:
        ast.parse(block)
