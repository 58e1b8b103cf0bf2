"""The import rules of fewstep, checked: `python tools/check_layers.py`. Exit status 1 and one line a fault when something is wrong.

The rules, exactly.

1. *Rows.* Every module belongs to a row of `ROWS`. A module may import from lower rows, nothing from its own row or a higher one, except:
   the files of one package may import each other (but see 2), and the pairs in `SAME_ROW`. `NOT_EVEN` lists what is forbidden although
   lower, `CEILINGS` the rows that see less than all that is below them. An import counts wherever it stands: at the top, inside a function,
   under TYPE_CHECKING, or as ``importlib.import_module("fewstep.x")``.
2. *Solvers.* A file of `solvers` imports no other file of it, nor the package itself; `solvers/__init__.py` may import them all.
3. *The root.* ``fewstep/__init__.py`` gathers the public names from the rows up to `ROOT_CEILING`. Inside the package only `cli` may
   ask the root for a name; the others import the module that has it. `__main__` imports `cli` alone, and nobody else imports `cli`.
4. *Libraries.* At the top of a module: the standard library and `CORE`. Any other library needs a row in `EXTRAS`, which names the
   extra that installs it, and is imported inside functions only, except in the modules of `AT_THE_TOP`. `numerics` imports no torch.
5. *Names.* No file or folder is called utils, common, helpers or misc.
6. *No pickle.* No import of a pickling module, no ``torch.load`` or ``torch.save``, no ``allow_pickle``: a file must not execute.
7. *At run time.* ``import fewstep`` and using its public names loads torch, NumPy, safetensors, what these need, and no more; and
   ``python -m fewstep --help`` loads no torch.

Rules 1-4 read ``src/fewstep``; 5 and 6 also the folders in `ALSO_CHECKED`. The checks read the syntax tree and import nothing; `--static`
leaves out rule 7, which needs an installed fewstep.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Fault", "check_runtime", "check_static", "main"]

PACKAGE = "fewstep"
ROWS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("0", ("errors", "numerics", "version")),
    ("1", ("artefacts", "preconditioning", "schedules", "predictions")),
    ("2", ("denoisers", "exact", "grids", "guidance", "identity", "models")),
    ("3", ("multistep", "plan", "recipes", "solver", "statistics")),
    ("4", ("solvers", "discrete")),
    ("5", ("noise", "dequantization", "sampler", "integrate", "likelihood", "restoration")),
    ("5b", ("azula", "diffusers", "export", "kdiffusion", "loading")),
    ("6", ("data", "train")),
    ("7", ("evaluate",)),
    ("8", ("tuners", "distill", "steer", "adapt", "merge")),
    ("9", ("act", "scale", "serve")),
    ("10", ("cli",)),
)
SAME_ROW = {
    ("exact", "denoisers"),
    ("exact", "identity"),
    ("guidance", "denoisers"),
    ("multistep", "plan"),
    ("multistep", "solver"),
    ("solver", "plan"),
    ("sampler", "noise"),
    ("loading", "diffusers"),
    ("likelihood", "integrate"),
    ("likelihood", "noise"),
    ("likelihood", "dequantization"),
    ("dequantization", "noise"),
    ("restoration", "noise"),
    ("restoration", "sampler"),
    ("distill", "adapt"),  # a student may be an adapter
    ("steer", "adapt"),  # and so may what is learnt from preferences
    ("distill", "tuners"),  # and is compared with tuned plans
}
"""(importer, imported) pairs that are allowed within a row. No cycles."""
NOT_EVEN = {("sampler", "solvers"), ("sampler", "discrete"), ("serve", "train")}
"""(importer, imported) pairs that are forbidden although the imported one is lower."""
CEILINGS = {"data": "5", "train": "5", "evaluate": "5"}
"""Modules that see the rows up to this one only."""
ROOT_CEILING = "8"
ASKS_THE_ROOT = {"cli"}
APART = {"solvers"}
"""Packages whose files do not import each other."""

CORE = {"torch", "numpy", "safetensors"}
EXTRAS = {
    "PIL": ("demo", "pillow"),
    "accelerate": ("diffusers", "accelerate"),
    "azula": ("azula", "azula"),
    "datasets": ("train", "datasets"),
    "cmaes": ("tune", "cmaes"),
    "diffusers": ("diffusers", "diffusers"),
    "fastapi": ("serve", "fastapi"),
    "gymnasium": ("act", "gymnasium"),
    "huggingface_hub": ("diffusers", "diffusers"),
    "matplotlib": ("demo", "matplotlib"),
    "mujoco": ("act", "mujoco"),
    "optuna": ("tune", "optuna"),
    "ot": ("evaluate", "POT"),
    "peft": ("diffusers", "peft"),
    "prometheus_client": ("serve", "prometheus-client"),
    "pydantic": ("serve", "fastapi"),
    "ray": ("scale", "ray"),
    "scipy": ("tune", "scipy"),
    "sklearn": ("demo", "scikit-learn"),
    "starlette": ("serve", "fastapi"),
    "torchmetrics": ("evaluate", "torchmetrics"),
    "tqdm": (None, "tqdm"),
    "transformers": ("diffusers", "transformers"),
    "uvicorn": ("serve", "uvicorn"),
}
"""Import name -> (an extra that installs it, or None for a plain dependency; its name there)."""
AT_THE_TOP: dict[str, set[str]] = {
    "diffusers": {"fewstep.diffusers"},
    "fastapi": {"fewstep.serve.http"},
    "gymnasium": {"fewstep.act.env"},
    "peft": {"fewstep.adapt.lora"},
    "pydantic": {"fewstep.serve.messages"},
    "starlette": {"fewstep.serve.answers", "fewstep.serve.http"},
}
"""Library -> modules that may import it at their top. Nothing else may load those modules unasked."""
NO_TORCH = {"fewstep.numerics"}
EMPTY_NAMES = {"utils", "common", "helpers", "misc"}
PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLING_CALLS = {("torch", "load"), ("torch", "save")}
ALSO_CHECKED = ("tests", "tools", "examples", "benchmarks", "integrations")
MAY_PICKLE = {"tests"}
"""Tests write the hostile files that fewstep must refuse."""


@dataclass(frozen=True)
class Fault:
    """One violation: where, which rule (a word), and what to do."""

    path: Path
    line: int
    rule: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: [{self.rule}] {self.message}"


@dataclass(frozen=True)
class Import:
    """One imported module, fully named, with the names taken from it."""

    module: str
    names: tuple[str, ...]
    line: int
    inside: bool
    typing_only: bool


def main(arguments: list[str] | None = None) -> int:
    """Check the tree and print the faults.

    Returns:
        the exit status: 0 if there is none.
    """
    parser = argparse.ArgumentParser(description="Check the import rules of fewstep.")
    parser.add_argument("root", nargs="?", type=Path, default=Path(__file__).parents[1], help="the checkout")
    parser.add_argument("--static", action="store_true", help="read files only; leave out what needs an installed fewstep")
    options = parser.parse_args(arguments)
    faults = check_static(options.root)
    for fault in faults:
        print(fault)
    problems = [] if options.static else check_runtime()
    for problem in problems:
        print(problem)
    if not faults and not problems:
        print("import layers: all well")
    return int(bool(faults or problems))


def check_static(root: Path) -> list[Fault]:
    """Rules 1 to 6 on the checkout at `root`."""
    package = root / "src" / PACKAGE
    if not package.is_dir():
        raise SystemExit(f"{package} does not exist. Give the folder that holds src/{PACKAGE}.")
    files = {path: _module_name(path, package) for path in sorted(package.rglob("*.py"))}
    faults: list[Fault] = []
    for path, module in files.items():
        tree = _parse(path, faults)
        if tree is None:
            continue
        shown = path.relative_to(root)
        faults += _check_row(shown, module)
        faults += _check_name(shown)
        faults += _check_pickle(shown, tree)
        for found in _imports(tree, module, is_package=path.name == "__init__.py"):
            faults += _check_library(shown, module, found)
            for target in _targets(found, set(files.values())):
                faults += _check_edge(shown, module, target, found.line)
    for folder in ALSO_CHECKED:
        for path in sorted((root / folder).rglob("*.py")):
            tree = _parse(path, faults)
            faults += _check_name(path.relative_to(root))
            if tree is not None and folder not in MAY_PICKLE:
                faults += _check_pickle(path.relative_to(root), tree)
    return sorted(set(faults), key=lambda fault: (str(fault.path), fault.line, fault.message))


# ---- reading -------------------------------------------------------------------------------------------------------------------------


def _parse(path: Path, faults: list[Fault]) -> ast.Module | None:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), str(path))
    except SyntaxError as error:
        faults.append(Fault(path, error.lineno or 1, "syntax", f"cannot be read: {error.msg}."))
        return None


def _module_name(path: Path, package: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(tree: ast.Module, module: str, *, is_package: bool) -> Iterator[Import]:
    """Every import statement and every ``import_module("constant")``."""
    stack: list[tuple[ast.AST, bool, bool]] = [(tree, False, False)]
    while stack:
        node, inside, typing_only = stack.pop()
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, (), node.lineno, inside, typing_only)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package=is_package)
            yield Import(base, tuple(alias.name for alias in node.names), node.lineno, inside, typing_only)
        elif isinstance(node, ast.Call) and _called(node) == "import_module" and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield Import(name.value, (), node.lineno, inside, typing_only)
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        deeper = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for field, value in ast.iter_fields(node):
            children = [child for child in (value if isinstance(value, list) else [value]) if isinstance(child, ast.AST)]
            stack.extend((child, deeper, typing_only or (guarded and field == "body")) for child in children)


def _called(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _absolute(node: ast.ImportFrom, module: str, *, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parts = module.split(".")
    base = parts[: len(parts) - node.level + int(is_package)]
    return ".".join([*base, *([node.module] if node.module else [])])


def _targets(found: Import, modules: set[str]) -> list[str]:
    """The fewstep modules that an import refers to. ``from fewstep import plan`` is the module, ``from fewstep import Plan`` the root."""
    if found.module.split(".")[0] != PACKAGE:
        return []
    if not found.names:
        return [found.module]
    known = {row_member for _, members in ROWS for row_member in members}
    targets = []
    for name in found.names:
        full = f"{found.module}.{name}"
        is_module = full in modules or (found.module == PACKAGE and name in known)
        targets.append(full if is_module else found.module)
    return targets


# ---- rules ---------------------------------------------------------------------------------------------------------------------------


def _member(module: str) -> str:
    """The second part of a module's name, which has the row: ``fewstep.solvers.ddim`` -> ``solvers``; "" for the root."""
    return [*module.split("."), ""][1]


def _row(member: str) -> int | None:
    for i, (_, members) in enumerate(ROWS):
        if member in members:
            return i
    return None


def _index(label: str) -> int:
    return [row for row, _ in ROWS].index(label)


def _check_row(path: Path, module: str) -> list[Fault]:
    member = _member(module)
    if member in ("", "__main__") or _row(member) is not None:
        return []
    return [Fault(path, 1, "layer", f"{module} has no row. Give it one in ROWS of tools/check_layers.py.")]


def _check_edge(path: Path, module: str, target: str, line: int) -> list[Fault]:
    importer, imported = _member(module), _member(target)

    def fault(message: str, rule: str = "layer") -> list[Fault]:
        return [Fault(path, line, rule, message)]

    if importer == "__main__":
        return [] if imported == "cli" else fault(f"__main__ may import {PACKAGE}.cli alone, not {target}.")
    if imported == "":
        if importer in ASKS_THE_ROOT or module == PACKAGE:
            return []
        return fault(f"{module} takes a name from {PACKAGE} itself. Import the module that defines it.")
    if _row(imported) is None:
        return fault(f"{module} imports {target}, which has no row. Give it one in ROWS of tools/check_layers.py.")
    if importer == imported:
        if importer in APART and module.count(".") >= 2 and target != module:
            what = "the package" if target.count(".") == 1 else "another file of it"
            return fault(f"{module} imports {target}: a file of {PACKAGE}.{importer} does not import {what}.", "solver")
        return []
    high, low = _row(importer), _row(imported)
    if module == PACKAGE:
        if low > _index(ROOT_CEILING):  # type: ignore[operator]
            return fault(f"{PACKAGE}/__init__.py may not import {target}: it gathers rows 0 to {ROOT_CEILING}.")
        return []
    if high is None or low is None:
        return []  # said already
    if (importer, imported) in NOT_EVEN:
        return fault(f"{module} may never import {PACKAGE}.{imported}.")
    if importer in CEILINGS and low > _index(CEILINGS[importer]):
        return fault(f"{module} imports {target} of row {ROWS[low][0]}, but {importer} sees rows 0 to {CEILINGS[importer]} only.")
    if low == high and (importer, imported) not in SAME_ROW:
        return fault(f"{module} imports {target} of its own row {ROWS[low][0]}. Move what they share to a lower row.")
    if low > high:
        return fault(f"{module} (row {ROWS[high][0]}) imports {target} of the higher row {ROWS[low][0]}. Imports point downwards.")
    return []


def _check_library(path: Path, module: str, found: Import) -> list[Fault]:
    library = found.module.split(".")[0]
    if module in NO_TORCH and library == "torch":
        return [Fault(path, found.line, "library", f"{module} works on the host: it does not import torch.")]
    if library in sys.stdlib_module_names or library in CORE or library == PACKAGE or found.typing_only:
        return []
    if library not in EXTRAS:
        message = (
            f"{module} imports {library}, which no extra installs. Add it to pyproject.toml and to EXTRAS of tools/check_layers.py."
        )
        return [Fault(path, found.line, "library", message)]
    if not found.inside and module not in AT_THE_TOP.get(library, set()):
        message = f"{module} imports {library} at its top. Import it inside the function that needs it."
        return [Fault(path, found.line, "library", message)]
    return []


def _check_name(path: Path) -> list[Fault]:
    bad = [part for part in (*path.parts[:-1], path.stem) if part.strip("_").lower() in EMPTY_NAMES]
    return [Fault(path, 1, "name", f"{part!r} names nothing. Call it what it is about.") for part in bad]


def _check_pickle(path: Path, tree: ast.Module) -> list[Fault]:
    faults = []

    def fault(node: ast.AST, what: str) -> None:
        faults.append(Fault(path, getattr(node, "lineno", 1), "pickle", f"{what}: a file must not execute. Use fewstep.artefacts."))

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PICKLERS:
                    fault(node, f"imports {alias.name}")
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if (node.module or "").split(".")[0] in PICKLERS:
                fault(node, f"imports {node.module}")
            for alias in node.names:
                if (node.module, alias.name) in PICKLING_CALLS:
                    fault(node, f"imports {node.module}.{alias.name}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in PICKLING_CALLS:
            fault(node, f"uses {node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", None) is not False:
            fault(node.value, "uses allow_pickle")
    return faults


# ---- run time ------------------------------------------------------------------------------------------------------------------------

IMPORT_PROBE = """
import importlib.metadata as metadata, re, sys
import torch, numpy, safetensors, safetensors.numpy, safetensors.torch
before = set(sys.modules)
import {package}
for name in getattr({package}, "__all__", []):
    if "{package}." + name not in {left_alone!r}:
        getattr({package}, name)
wanted, queue = set(), ["torch", "numpy", "safetensors"]
while queue:
    name = queue.pop()
    if name in wanted:
        continue
    wanted.add(name)
    try:
        needs = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        continue
    queue += [re.split(r"[^A-Za-z0-9_.-]", need)[0].lower().replace("_", "-") for need in needs if "extra ==" not in need]
own = {{top for top, names in metadata.packages_distributions().items() if wanted & {{n.lower().replace("_", "-") for n in names}}}}
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(" ".join(sorted(new - own - sys.stdlib_module_names - {{"{package}"}})))
"""
HELP_PROBE = """
import runpy, sys
sys.argv = ["{package}", "--help"]
try:
    runpy.run_module("{package}", run_name="__main__", alter_sys=True)
except SystemExit as stop:
    if stop.code:
        raise
print("FOUND" if "torch" in sys.modules else "", file=sys.stderr)
"""


def check_runtime(package: str = PACKAGE, left_alone: set[str] | None = None, extra_path: Path | None = None) -> list[str]:
    """Rule 7, in processes of their own.

    Args:
        package: what to import.
        left_alone: full names of public modules that load an optional library when used; those of `AT_THE_TOP` when left out.
        extra_path: a folder to search for the package first.

    Returns:
        the faults, one message each.
    """
    modules = set().union(*AT_THE_TOP.values()) if left_alone is None else left_alone
    faults = []
    done = _run(IMPORT_PROBE.format(package=package, left_alone=modules), extra_path)
    if done.returncode:
        faults.append(f"import {package}: fails:\n{done.stderr.strip()}")
    elif extra := done.stdout.split("\n")[-2].split():
        faults.append(
            f"import {package}: [runtime] loads {', '.join(extra)} besides torch, numpy and safetensors. Import inside functions."
        )
    done = _run(HELP_PROBE.format(package=package), extra_path)
    if done.returncode:
        faults.append(f"python -m {package} --help: [runtime] fails:\n{done.stderr.strip()}")
    elif "FOUND" in done.stderr:
        faults.append(f"python -m {package} --help: [runtime] imports torch. Import it inside the commands.")
    return faults


def _run(code: str, extra_path: Path | None) -> subprocess.CompletedProcess[str]:
    search = [] if extra_path is None else [f"import sys; sys.path.insert(0, {str(extra_path)!r})"]
    return subprocess.run([sys.executable, "-c", "\n".join([*search, code])], capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
