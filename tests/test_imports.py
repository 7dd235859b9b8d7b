"""The one-way import rule of the design, read from the syntax trees: a layer imports what lies below it, only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "diffulm"

#: From the top down. Members of one layer are siblings and never import each other; a package is one
#: member, and the modules inside it may.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("adapt", "sft"),
    ("job", "answers", "bench"),
    ("serve", "eval", "train", "data", "convert", "export"),
    ("sampling", "hub"),
    ("adapters", "model", "probe", "released"),
    ("objective", "denoiser", "weights", "embedded", "template"),
    ("process", "layout", "tokenizer"),
    ("schedule", "runtime", "render", "card", "rows", "attention"),
)
DEPTH = {member: depth for depth, layer in enumerate(LAYERS) for member in layer}

TRANSFORMERS = {"denoiser.py", "convert.py", "hub.py", "tokenizer.py"}
#: Type annotations only, never at run time.
TRANSFORMERS_TYPES = {"data/prepare.py", "data/pieces.py", "data/estimate.py", "template.py", "model.py"}


@dataclass(frozen=True)
class Import:
    """One imported module: absolute dotted name, and where the statement stands."""

    file: str
    line: int
    name: str
    in_function: bool
    type_checking: bool


def files() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def walk(node: ast.AST, *, in_function: bool = False, types: bool = False) -> Iterator[tuple[ast.stmt, bool, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, in_function, types
        checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from walk(child, in_function=in_function or function, types=types or checking)


def imports_of(path: Path, text: str | None = None) -> list[Import]:
    """Every import of a file, relative ones resolved, `from package import module` as package.module."""
    package = ["diffulm", *path.relative_to(SOURCE).parts[:-1]]
    found = []
    for node, in_function, types in walk(ast.parse(text or path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            assert isinstance(node, ast.ImportFrom)
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from . import hub` names a module; `from .hub import load` names something inside one.
            names = [f"{module}.{a.name}" if is_module(f"{module}.{a.name}") else module for a in node.names]
        found += [Import(relative(path), node.lineno, name, in_function, types) for name in names]
    return found


def is_module(dotted: str) -> bool:
    path = SOURCE.parent.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


@cache
def all_imports() -> tuple[Import, ...]:
    return tuple(i for path in files() for i in imports_of(path))


def member(file: str) -> str:
    """The layer member a file belongs to: its package, or its own name."""
    return file.split("/")[0].removesuffix(".py")


def imported_member(name: str) -> str | None:
    """The member of `diffulm.x.y`; None for other packages and for `diffulm` itself (its version)."""
    parts = name.split(".")
    return parts[1] if parts[0] == "diffulm" and len(parts) > 1 else None


def forbidden(imports: list[Import] | tuple[Import, ...]) -> list[str]:
    """Imports that go up or sideways, in words."""
    found = []
    for i in imports:
        low, high = imported_member(i.name), member(i.file)
        if low is None or low == high or high == "__init__":
            continue
        if DEPTH[low] <= DEPTH[high]:
            found.append(f"{i.file}:{i.line} imports {i.name}")
    return found


def test_every_file_has_its_place() -> None:
    assert len(files()) > 20
    assert {member(relative(p)) for p in files()} - set(DEPTH) == {"__init__"}


def test_imports_go_one_way() -> None:
    assert not forbidden(all_imports())


@pytest.mark.parametrize(
    ("file", "statement", "wrong"),
    [
        ("layout.py", "from .denoiser import HFDenoiser", True),
        ("process.py", "from .layout import Rows", True),
        ("process.py", "from .runtime import uniforms", False),
        ("train/loop.py", "def f():\n    from ..data.loader import Loader", True),
        (
            "train/loop.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from diffulm.eval import report",
            True,
        ),
        ("train/loop.py", "from . import checkpoint\nfrom .optim import learning_rate", False),
        ("eval/report.py", "from .. import convert", True),
        ("eval/report.py", "from .. import runtime, __version__", False),
        ("hub.py", "from .sampling import generate", True),
        ("released.py", "from . import hub", True),
        ("adapters.py", "from . import released", True),
        ("adapters.py", "from . import runtime, weights", False),
        ("runtime.py", "import diffulm.render", True),
        ("sft.py", "from .adapt import data_stage", True),
        ("sft.py", "from .job.arm import fit", False),
        ("job/folder.py", "from ..answers import Answered", True),
        ("job/arm.py", "from .folder import Run", False),
        ("cli/text.py", "from ..__main__ import entry", True),
    ],
)
def test_the_rule_can_fail(file: str, statement: str, wrong: bool) -> None:
    assert bool(forbidden(imports_of(SOURCE / file, statement))) == wrong


def importers(package: str) -> set[str]:
    return {i.file for i in all_imports() if i.name == package or i.name.startswith(package + ".")}


def test_transformers_stays_in_four_files() -> None:
    assert importers("transformers") <= TRANSFORMERS | TRANSFORMERS_TYPES
    for i in all_imports():
        if i.name.split(".")[0] == "transformers" and i.file in TRANSFORMERS_TYPES:
            assert i.type_checking, f"{i.file}:{i.line}"
        if i.name.split(".")[0] == "transformers":
            assert i.in_function or i.type_checking, f"{i.file}:{i.line}: transformers takes seconds to import"


def test_torch_distributed_stays_in_train() -> None:
    assert {f for f in importers("torch.distributed") if not f.startswith("train/")} == set()
    for path in files():
        if member(relative(path)) != "train":
            assert "torch.distributed" not in path.read_text(encoding="utf-8"), relative(path)


def test_what_is_private_stays_in_its_file() -> None:
    """A name with an underscore is nobody else's, in the same package neither."""
    found = [
        f"{relative(path)}:{node.lineno} imports {alias.name}"
        for path in files()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not found


@pytest.mark.parametrize(
    "package", ["datasets", "matplotlib", "peft", "lm_eval", "fastapi", "uvicorn", "prometheus_client", "rouge_score"]
)
def test_heavy_packages_are_imported_in_one_file_inside_functions(package: str) -> None:
    where = [i for i in all_imports() if i.name.split(".")[0] == package]
    assert len({i.file for i in where if not i.type_checking}) <= 1, sorted({i.file for i in where})
    assert all(i.in_function or i.type_checking for i in where)
    if package in ("datasets", "matplotlib"):
        assert where


def test_nothing_needs_triton_or_remote_code() -> None:
    for package in ("triton", "liger_kernel", "flash_attn", "xformers", "bitsandbytes"):
        assert not importers(package)
    for path in files():
        assert "trust_remote_code=True" not in re.sub(r'""".*?"""|\'\'\'.*?\'\'\'', "", path.read_text(), flags=re.S)


def test_importing_the_package_loads_neither_torch_nor_transformers() -> None:
    heavy = ["torch", "transformers", "datasets", "numpy", "rich", "tyro", "matplotlib", "safetensors"]
    code = f"import sys, diffulm; print(dir(diffulm) and [m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import diffulm

    for name in diffulm.__all__:
        assert getattr(diffulm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonesuch'"):
        diffulm.nonesuch  # noqa: B018


# -------------------------------------------------------------------------------------------- no ids and no homes


def token_ids(text: str) -> list[str]:
    """Plain decimal numbers above a thousand that are no size: what a token id pasted from a config looks like.

    Round numbers and powers of two are sizes; 0x..., 1_000_003 and 1e6 were written by someone who meant a number.
    """
    numbers = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant) and type(n.value) is int]
    large = [n for n in numbers if n.value > 1000 and n.value % 100 and n.value & (n.value - 1)]
    written = [ast.get_source_segment(text, n) or "" for n in large]
    return [word for word in written if word.isdigit()]


def test_no_token_id_in_source() -> None:
    """Ids of published models are held as token strings and resolved through the tokenizer."""
    found = {relative(path): token_ids(path.read_text(encoding="utf-8")) for path in files()}
    assert not {file: ids for file, ids in found.items() if ids}
    assert token_ids("mask, bos, n, m, h = 126336, 50256, 4096, 10_001, 0xFFFE\nx = 49152 + 811") == [
        "126336",
        "50256",
        "49152",
    ]


def test_no_home_directory_in_source() -> None:
    home = re.compile(r"/home/|/Users/|/root/|/mnt/|/work/|C:\\\\")
    found = [relative(p) for p in files() if home.search(p.read_text(encoding="utf-8"))]
    assert not found
