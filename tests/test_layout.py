"""The house holds: who may import whom, no circles, files that stay short, and packages that get installed."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHORT = 400  # lines
OWN_MODULES = {"__init__", "errors", "stage_table", "config", "model_config", "recipe", "plan"}  # of rlhf/ itself

# What each package may import of ours besides itself; "root" is the modules of rlhf/ itself.
MAY_IMPORT = {
    "root": set(),
    "functional": set(),
    "system": {"root"},
    "data": {"root", "system"},
    "models": {"root", "system", "data"},
    "run": {"root", "system", "data", "models"},
    "rollout": {"root", "functional", "system", "models"},
    "training": {"root", "functional", "system", "data", "models", "run", "rollout"},
    "labeling": {"root", "functional", "system", "data", "models", "run", "rollout"},
    "costs": {"root", "system", "data", "models", "rollout"},
    "evaluation": {"root", "functional", "system", "data", "models", "run", "rollout", "labeling"},
}
MAY_IMPORT["stages"] = {*MAY_IMPORT["evaluation"], "training", "evaluation"}
MAY_IMPORT["launch"] = {*MAY_IMPORT["stages"], "costs"}


def modules(root: Path) -> dict[str, Path]:
    """Return the files of our packages by dotted module name."""
    found = {}
    for top in ("rlhf", "stages", "launch"):
        for path in sorted((root / top).rglob("*.py")):
            found[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def package(module: str) -> str:
    """Return the row of MAY_IMPORT that a module belongs to."""
    top, _, rest = module.partition(".")
    if top != "rlhf":
        return top
    first = rest.split(".")[0]
    return first if first in MAY_IMPORT else "root"


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of ours that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:  # a name in a package is a module where there is a file of that name
                module = f"{node.module}.{alias.name}"
                found.add(module if module in known else node.module)
    return found & known.keys()


def violations(root: Path) -> list[str]:
    """Return what breaks the rules of the layout in the tree below `root`, one line each."""
    known = modules(root)
    uses = {module: imports(path, known) - {module} for module, path in known.items()}
    found = [
        f"{module} imports {used}"
        for module, others in uses.items()
        for used in sorted(others)
        if package(used) != package(module) and package(used) not in MAY_IMPORT[package(module)]
    ]
    found += [f"{path.relative_to(root)} has {n} lines" for path in known.values() if (n := lines(path)) > SHORT]
    own = {path.stem for path in (root / "rlhf").glob("*.py")}
    found += [f"rlhf/{name}.py is in no package" for name in sorted(own - OWN_MODULES)]
    return found + circles(uses)


def lines(path: Path) -> int:
    """Return the number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def circles(uses: dict[str, set[str]]) -> list[str]:
    """Return the modules that import each other in a circle: what is left after taking away those that do not."""
    left = {module: set(others) for module, others in uses.items()}
    while free := {module for module, others in left.items() if not others & left.keys()}:
        left = {module: others for module, others in left.items() if module not in free}
    # What only uses a circle is not in one: take away modules that nothing left imports.
    while unused := left.keys() - {other for others in left.values() for other in others}:
        left = {module: others for module, others in left.items() if module not in unused}
    return [f"a circle of imports among {', '.join(sorted(left))}"] if left else []


def uninstalled(root: Path) -> list[str]:
    """Return the files in our packages that pyproject.toml does not install, and the packages that it makes up."""
    setup = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    places = setup.get("package-dir", {})
    folders = {name: root / places.get(name, name.replace(".", "/")) for name in setup["packages"]}
    data = {owner: each for owner, each in setup["package-data"].items() if owner in setup["packages"]}
    patterns = [f"{owner.replace('.', '/')}/{pattern}" for owner, each in data.items() for pattern in each]
    found = [f"pyproject.toml names {name}, which is not there" for name, path in folders.items() if not path.is_dir()]
    for top in ("rlhf", "stages", "launch"):
        for path in sorted((root / top).rglob("*")):
            if not path.is_file() or "__pycache__" in path.parts:
                continue
            if path.suffix == ".py":
                installed = ".".join(path.relative_to(root).parent.parts) in setup["packages"]
            else:
                installed = any(map(path.match, patterns))
            if not installed:
                found.append(f"pyproject.toml does not install {path.relative_to(root)}")
    return found


def test_imports_go_down_files_are_short_and_everything_is_installed() -> None:
    assert violations(ROOT) + uninstalled(ROOT) == []


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        (
            "rlhf/functional/ppo.py",
            "from rlhf.rollout import sampling",
            "rlhf.functional.ppo imports rlhf.rollout.sampling",
        ),
        (
            "rlhf/run/stage.py",
            "def f():\n    import rlhf.rollout.sampling",
            "rlhf.run.stage imports rlhf.rollout.sampling",
        ),
        ("rlhf/labeling/base.py", "import launch.cli", "rlhf.labeling.base imports launch.cli"),
        ("rlhf/data/records.py", "\n" * 400 + "x = 1", "rlhf/data/records.py has 401 lines"),
        ("rlhf/helpers.py", "", "rlhf/helpers.py is in no package"),
        ("rlhf/rollout/other.py", "import rlhf.rollout.sampling", "a circle of imports among rlhf.rollout.other, "),
    ],
)
def test_what_breaks_the_layout_is_named(tmp_path: Path, path: str, text: str, said: str) -> None:
    for name in ("rollout/sampling", "models/loading"):
        (tmp_path / "rlhf" / name).parent.mkdir(parents=True)
        (tmp_path / "rlhf" / f"{name}.py").write_text("from rlhf.rollout import other" if "other" in path else "")
    for folder in ("launch", Path(path).parent):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    (tmp_path / "launch" / "cli.py").touch()
    (tmp_path / path).write_text(text)
    assert [line for line in violations(tmp_path) if line.startswith(said)], violations(tmp_path)


def test_a_package_that_is_not_installed_is_named(tmp_path: Path) -> None:
    (tmp_path / "rlhf" / "new").mkdir(parents=True)
    (tmp_path / "rlhf" / "new" / "code.py").touch()
    (tmp_path / "rlhf" / "new" / "page.css").touch()
    setup = '[tool.setuptools]\npackages = ["rlhf", "gone"]\n[tool.setuptools.package-data]\n'
    (tmp_path / "pyproject.toml").write_text(setup)
    assert uninstalled(tmp_path) == [
        "pyproject.toml names gone, which is not there",
        "pyproject.toml does not install rlhf/new/code.py",
        "pyproject.toml does not install rlhf/new/page.css",
    ]
