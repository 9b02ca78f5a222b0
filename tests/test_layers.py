"""Holds the one-way order of the folders, and who may touch the world outside."""

import ast
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

# Which other folders a folder may import. A folder may always import itself.
LAYERS = {"ps_core", "ps_server", "ps_worker", "allreduce", "pipeline"}
MAY_IMPORT: dict[str, set[str]] = {
    "ps_core": set(),
    "ps_server": {"ps_core"},
    "ps_worker": {"ps_core"},
    "allreduce": {"ps_core"},
    "pipeline": {"ps_core"},
    "shardline": LAYERS,
    "examples": {*LAYERS, "shardline"},
    "benchmarks": {*LAYERS, "shardline"},
    "tests": {*LAYERS, "shardline", "scripts"},
    "scripts": {"ps_core"},
}
PACKAGES = {*LAYERS, "shardline"}


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name. `at_load` is False inside functions and under TYPE_CHECKING."""

    target: str
    line: int
    at_load: bool


@dataclass(frozen=True, slots=True)
class Module:
    path: str
    text: str
    tree: ast.Module
    imports: tuple[Import, ...]

    @property
    def folder(self) -> str:
        return self.path.split("/")[0]

    @property
    def name(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True, slots=True)
class Fence:
    """Names which the packages' files matching `within` may use only if they also match `homes`."""

    rule: str
    names: tuple[str, ...]
    homes: tuple[str, ...] = ()
    within: tuple[str, ...] = ("*",)


FENCES = (
    Fence(
        "gRPC stays at the edge",
        names=("grpc*",),
        homes=(
            "ps_core/rpc.py",
            "ps_core/errors.py",  # the one table between errors and gRPC statuses
            "ps_server/service*.py",
            "ps_server/lead_link.py",
            "ps_server/server.py",
            "ps_worker/calls.py",
            "ps_worker/client.py",
            "*/__main__.py",
        ),
    ),
    # The lead's metrics have a file of their own: the other shards do not show them.
    Fence("metrics live in ps_core", ("prometheus_client",), ("ps_core/*metrics.py",)),
    Fence(
        "one file reads the environment",
        names=("os.environ", "os.getenv"),
        homes=(
            "ps_core/config.py",
            "ps_core/__init__.py",  # sets what grpc reads when it is imported
        ),
    ),
    Fence("two packages group processes", ("torch.distributed",), ("allreduce/*", "pipeline/*")),
    Fence(
        "deciding code has no clock and no threads",
        names=("time", "threading", "asyncio"),
        within=(
            *(f"ps_core/{name}.py" for name in ("plan", "codec", "buckets", "ranges")),
            *(f"ps_core/{name}.py" for name in ("leases", "lease_pool", "dialogue")),
            *(f"ps_server/{name}.py" for name in ("shard", "part", "policy", "held", "gate")),
            *(f"ps_server/{name}.py" for name in ("lead", "crew", "ledger", "seals", "clip")),
            *(f"ps_server/{name}.py" for name in ("meeting", "patience", "liveness")),
            *(f"ps_server/{name}.py" for name in ("heartbeats", "stragglers")),
            "pipeline/partition.py",
        ),
    ),
    Fence(
        "no serializer that can run code",
        names=("pickle", "cloudpickle", "dill", "shelve", "marshal", "torch.load", "torch.save"),
    ),
    Fence("no code from strings", names=("builtins.eval", "builtins.exec")),
)


def parse(path: str, text: str) -> Module:
    tree = ast.parse(text, filename=path)
    return Module(path, text, tree, tuple(_imports(tree, path.split("/")[:-1], at_load=True)))


def _imports(node: ast.AST, package: list[str], at_load: bool) -> Iterator[Import]:
    match node:
        case ast.Import():
            for alias in node.names:
                yield Import(alias.name, node.lineno, at_load)
        case ast.ImportFrom():
            base = package[: len(package) + 1 - node.level] if node.level else []
            parts = [*base, *filter(None, [node.module])]
            for alias in node.names:
                yield Import(".".join([*parts, alias.name]), node.lineno, at_load)
        case ast.If(test=ast.Name(id="TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
            for guarded in node.body:
                yield from _imports(guarded, package, at_load=False)
            for guarded in node.orelse:
                yield from _imports(guarded, package, at_load)
        case _:
            in_function = isinstance(node, FUNCTIONS)
            for child in ast.iter_child_nodes(node):
                yield from _imports(child, package, at_load and not in_function)


def names_used(module: Module) -> Iterator[tuple[str, int]]:
    """Imports, dotted names that begin with an imported one, and builtins."""
    yield from ((imported.target, imported.line) for imported in module.imports)
    known = _known_names(module.tree)
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in known:
                yield f"{known[first]}.{rest}", node.lineno
        elif isinstance(node, ast.Name) and node.id not in known:
            yield f"builtins.{node.id}", node.lineno


def _known_names(tree: ast.Module) -> dict[str, str]:
    """What the names bound by imports stand for: `import torch as t` gives t → torch."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.split(".")[0]
                known[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return known


def arrow_problems(modules: Iterable[Module]) -> Iterator[str]:
    for module in modules:
        allowed = MAY_IMPORT[module.folder] | {module.folder}
        for imported in module.imports:
            folder = imported.target.split(".")[0]
            if folder in MAY_IMPORT and folder not in allowed:
                yield f"{module.path}:{imported.line}: {module.folder} must not import {folder}"


def cycle_problems(modules: Iterable[Module]) -> Iterator[str]:
    by_name = {module.name: module for module in modules}
    lines: dict[str, dict[str, int]] = {}  # importer → imported → line
    for module in by_name.values():
        for imported in module.imports:
            parts = imported.target.split(".")
            prefixes = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
            target = next((prefix for prefix in prefixes if prefix in by_name), None)
            if imported.at_load and target is not None:
                lines.setdefault(module.name, {}).setdefault(target, imported.line)
    try:
        TopologicalSorter(lines).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1][::-1]  # graphlib lists the imported module first
        line = lines[cycle[0]][cycle[1]]
        yield f"{by_name[cycle[0]].path}:{line}: import cycle {' → '.join(cycle)}"


def fence_problems(modules: Iterable[Module], fence: Fence) -> Iterator[str]:
    patterns = [pattern for name in fence.names for pattern in (name, f"{name}.*")]
    for module in modules:
        fenced = module.folder in PACKAGES and _matches(module.path, fence.within)
        if not fenced or _matches(module.path, fence.homes):
            continue
        for line in sorted({line for name, line in names_used(module) if _matches(name, patterns)}):
            yield f"{module.path}:{line}: {fence.rule} ({', '.join(fence.names)})"


def file_size_problems(modules: Iterable[Module]) -> Iterator[str]:
    for module in modules:
        size = len(module.text.splitlines())
        if module.folder in PACKAGES and size > MAX_FILE_LINES:
            yield f"{module.path}:{size}: a file has at most {MAX_FILE_LINES} lines"


def function_size_problems(modules: Iterable[Module]) -> Iterator[str]:
    for module in modules:
        for node in ast.walk(module.tree):
            if isinstance(node, FUNCTIONS) and module.folder in PACKAGES:
                size = _num_code_lines(node, module.text.splitlines())
                if size > MAX_FUNCTION_LINES:
                    rule = f"{size} lines of code, at most {MAX_FUNCTION_LINES}"
                    yield f"{module.path}:{node.lineno}: `{node.name}` has {rule}"


def _num_code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Lines from `def` to the end, without the docstring, blank lines and comments."""
    first, start, end = node.body[0], node.lineno - 1, node.end_lineno
    code = lines[start:end]
    if ast.get_docstring(node) is not None:
        code = lines[start : first.lineno - 1] + lines[first.end_lineno : end]
    return sum(line.strip()[:1] not in ("", "#") for line in code)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


RULES: dict[str, Callable[[list[Module]], Iterator[str]]] = {
    "imports point one way": arrow_problems,
    "imports have no cycle": cycle_problems,
    "files are short": file_size_problems,
    "functions are short": function_size_problems,
    **{fence.rule: partial(fence_problems, fence=fence) for fence in FENCES},
}


@pytest.fixture(scope="module")
def project() -> list[Module]:
    paths = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))
    return [
        parse(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
        for path in paths
        if not path.stem.endswith("_pb2")
    ]


def test_every_top_level_package_has_a_row_in_the_table() -> None:
    assert {path.parent.name for path in ROOT.glob("*/__init__.py")} <= MAY_IMPORT.keys()


@pytest.mark.parametrize("rule", RULES)
def test_the_project_keeps(rule: str, project: list[Module]) -> None:
    problems = list(RULES[rule](project))
    assert not problems, "\n".join(["", *problems])


def _problems(sources: dict[str, str]) -> list[str]:
    modules = [parse(path, text) for path, text in sources.items()]
    return [problem for rule in RULES.values() for problem in rule(modules)]


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("ps_core/a.py", "import ps_server.shard", "ps_core must not import ps_server"),
        ("ps_worker/a.py", "def f():\n from ps_server import x", "must not import ps_server"),
        ("shardline/a.py", "import examples.digits", "shardline must not import examples"),
        ("ps_core/a.py", "from . import a", "import cycle ps_core.a → ps_core.a"),
        ("ps_core/a.py", "import grpc.aio", "gRPC"),
        ("shardline/cli.py", "from grpc_health.v1 import health", "gRPC"),
        ("ps_server/a.py", "from prometheus_client import Counter", "metrics"),
        ("shardline/a.py", "import os as o\no.environ['A']", "environment"),
        ("ps_core/a.py", "from os import getenv", "environment"),
        ("ps_core/a.py", "import torch\ntorch.distributed.barrier()", "two packages"),
        ("ps_core/plan.py", "from time import monotonic", "no clock"),
        ("ps_core/a.py", "import pickle", "serializer"),
        ("ps_core/a.py", "import torch\ntorch.load('a').b", "serializer"),
        ("ps_core/a.py", "eval('1')", "strings"),
        ("ps_core/a.py", "\n" * 601, "600 lines"),
        ("ps_core/a.py", "def f():\n" + " g()\n" * 60, "`f` has 61 lines"),
    ],
)
def test_the_walker_finds(path: str, text: str, expected: str) -> None:
    [problem] = _problems({path: text})
    assert problem.startswith(f"{path}:")
    assert expected in problem


def test_the_walker_names_the_line_and_the_way_of_a_cycle() -> None:
    sources = {"ps_core/a.py": "\nimport ps_core.b", "ps_core/b.py": "from . import a"}
    assert _problems(sources) == ["ps_core/a.py:2: import cycle ps_core.a → ps_core.b → ps_core.a"]


def test_the_walker_accepts_what_the_rules_allow() -> None:
    sources = {
        "ps_core/a.py": "import time\nif TYPE_CHECKING:\n from ps_core.b import B",
        "ps_core/b.py": "from ps_core.a import A\ndef f():\n import ps_core.b\n model.eval()",
        "ps_core/c.py": "def f():\n '''\n" + " a\n" * 60 + " '''\n # why\n\n g()",
        "ps_core/rpc.py": "import grpc",
        "ps_server/a.py": "from ps_core import rpc",
        "allreduce/a.py": "import torch.distributed",
        "tests/a.py": "import grpc, pickle, tests.b, shardline",
    }
    assert _problems(sources) == []
