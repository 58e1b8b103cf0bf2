"""The tables of `docs/migration.md`, made from `docs/migration.json`: `python tools/migration_table.py`.

`--check` changes nothing and exits with status 1 if the page is not up to date. The page says where a table goes:

    <!-- schedulers:start -->       schedulers of diffusers
    <!-- schedulers:end -->

    <!-- samplers:start -->         functions of k-diffusion, with the names that user interfaces give them
    <!-- samplers:end -->

    <!-- levels:start -->           rules for the noise levels
    <!-- levels:end -->

A row of the JSON has the peer's name, `theirs`, with its `settings` and the arguments of every `step`; what takes its place, `ours` (the
solver and its options) or `call` (any other code), or neither, if nothing does; and a `note`. `fault` names what is wrong with theirs,
where both differ for that reason, and `test` is what only the tests need. `tests/test_migration.py` runs every row.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["main", "replace"]

ROOT = Path(__file__).parents[1]
MARK = re.compile(r"<!-- (schedulers|samplers|levels):start -->\n.*?<!-- \1:end -->", re.DOTALL)
HEADS = {
    "schedulers": ("diffusers", "`PlanScheduler.from_config(config, ...)`", ""),
    "samplers": ("k-diffusion", "in menus", "`kdiffusion_sampler(...)`", ""),
    "levels": ("k-diffusion", "in menus", "fewstep", ""),
}
NONE = "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """Bring the page up to date, or check it.

    Returns:
        the exit status.
    """
    parser = argparse.ArgumentParser(description="Write the tables of the page on migration.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is not up to date")
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkout")
    options = parser.parse_args(arguments)
    page = options.root / "docs" / "migration.md"
    old = page.read_text(encoding="utf-8")
    new = replace(old, json.loads(page.with_suffix(".json").read_text(encoding="utf-8")))
    if new == old:
        return 0
    if options.check:
        print("docs/migration.md is not up to date with docs/migration.json. Run: python tools/migration_table.py")
        return 1
    page.write_text(new, encoding="utf-8")
    return 0


def replace(page: str, rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The page with its tables made anew.

    Args:
        page: Markdown.
        rows: name of the table -> its rows.
    """
    return MARK.sub(lambda mark: f"<!-- {mark[1]}:start -->\n{_table(mark[1], rows[mark[1]])}\n<!-- {mark[1]}:end -->", page)


def _table(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    head = HEADS[name]
    lines = [_line(head), _line(["---"] * len(head))]
    for row in rows:
        cells = [_theirs(row), row.get("menu") or "–", _ours(row), _note(row)]
        lines.append(_line(cells if len(head) == len(cells) else [cells[0], *cells[2:]]))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _theirs(row: Mapping[str, Any]) -> str:
    given = [*_arguments(row.get("settings", {})), *(f"step({argument})" for argument in _arguments(row.get("step", {})))]
    return f"`{row['theirs']}`" + "".join(f", `{argument}`" for argument in given)


def _ours(row: Mapping[str, Any]) -> str:
    if "ours" in row:
        return f"`{', '.join(_arguments(row['ours']))}`"
    return f"`{row['call']}`" if "call" in row else NONE


def _note(row: Mapping[str, Any]) -> str:
    fault = f"Differs: {row['fault']}" if "fault" in row else ""
    return " ".join(part for part in (fault, row.get("note", "")) if part)


def _arguments(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_written(value)}" for name, value in values.items()]


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(map(_written, value))})"
    return f'"{value}"' if isinstance(value, str) else repr(value)


if __name__ == "__main__":
    raise SystemExit(main())
