"""Every file, module, function, class and make target that a page names between backticks exists."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.docs.reading import REPOSITORY, Place, pages, spans

ROOTS = ("qconvert", "runtime/qrun", "tests", "benchmarks", ".ci")
_PATH = re.compile(r"[\w.-]+(/[\w.{},*-]+)+/?|[\w-]+\.(py|sh|md|toml)|[a-z_]+/")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(\(\))?")

# Spans that look like names of ours and are not: what another program or a graph calls something, and
# files that a user has.
OTHERS = (
    "com.microsoft",  # ONNX Runtime's domain of operators
    "glibc.malloc.hugetlb",
    "session.dynamic_block_base",  # a setting of ONNX Runtime
    "session.save_external_prepacked_constant_initializers",  # another
    "model.layers",  # the checkpoint's tensors
    "lm_head.weight",
    "graph.",  # keys of qconvert.json
    "kv_cache.",
    "tokens.eos",
    "stream_options.",  # fields of OpenAI's API
    "usage.",
    "verification.",
    "org/name",  # the shape of a model id
    "report.md",  # what commands write
    "report/",
    "--work/records",
    ".cache/",
    ".venv",
    "~/.cache/",
)
USERS_FILES = re.compile(r".*\.(json|onnx|data|plan|jinja|txt|safetensors|html|failed)")


@cache
def files() -> dict[str, Path]:
    """Every file and folder of the source by its path from the repository, from its room, and by its name."""
    found: dict[str, Path] = {}
    for root in ROOTS:
        for path in (REPOSITORY / root).rglob("*"):
            if "__pycache__" in path.parts:
                continue
            parts = path.relative_to(REPOSITORY).parts
            for start in range(len(parts)):
                found.setdefault("/".join(parts[start:]), path)
    for path in [*REPOSITORY.glob("*.*"), REPOSITORY / "Makefile", *(REPOSITORY / "docs").iterdir()]:
        found[path.name] = path
        found[str(path.relative_to(REPOSITORY))] = path
    return found


@cache
def definitions() -> dict[str, set[str]]:
    """The dotted names of all definitions, such as ``verify.verify``, with their files."""
    names: dict[str, set[str]] = {}
    for root in ("qconvert", "runtime/qrun", "benchmarks", "tests"):
        for path in (REPOSITORY / root).rglob("*.py"):
            module = path.relative_to(REPOSITORY).with_suffix("").parts
            module = module[1:] if module[0] == "runtime" else module
            module = module[:-1] if module[-1] == "__init__" else module
            inside = [[], *_names(ast.parse(path.read_text(encoding="utf-8")))]
            for name in inside:
                whole = [*module, *name]
                for start in range(len(whole)):
                    names.setdefault(".".join(whole[start:]), set()).add(str(path))
    return names


def _names(tree: ast.AST) -> list[list[str]]:
    found: list[list[str]] = []
    for node in getattr(tree, "body", []):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append([node.name])
            found += [[node.name, *rest] for rest in _names(node)] if isinstance(node, ast.ClassDef) else []
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found += [[target.id] for target in targets if isinstance(target, ast.Name)]
        if isinstance(node, ast.ImportFrom):
            found += [[alias.asname or alias.name] for alias in node.names]
    return found


def _ours(place: Place) -> bool:
    text = place.text
    return not USERS_FILES.fullmatch(text) and not text.startswith(OTHERS)


def missing(place: Place) -> bool:
    """Whether a span names a file or a definition of ours, and there is none."""
    text = place.text.removesuffix("()")
    if _PATH.fullmatch(text):
        paths = _braces(text.rstrip("/"))
        return not all(path in files() or any(REPOSITORY.glob(path)) for path in paths)
    if _DOTTED.fullmatch(text):
        return text not in definitions() and text not in files()
    return False


def _braces(text: str) -> list[str]:
    """``a/{b,c}.py`` stands for two paths."""
    match = re.search(r"\{([^}]*)\}", text)
    if match is None:
        return [text]
    return [text[: match.start()] + part + text[match.end() :] for part in match.group(1).split(",")]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_name_on_a_page_exists(page: Path) -> None:
    assert not [str(place) for place in spans(page) if _ours(place) and missing(place)]


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (page.parent / link).exists()]


@pytest.mark.parametrize(
    "text", ["qconvert/proof/no.py", "verify.nothing", "nothing.py", "decoding/{generate,no}.py"]
)
def test_a_name_that_is_gone_is_found(text: str) -> None:
    assert missing(Place("page", 1, text))


@pytest.mark.parametrize(
    "text", ["qconvert/export.py", "manifest.read_manifest", "model.Model.open", "formats/"]
)
def test_a_name_that_stands_is_not_complained_about(text: str) -> None:
    assert not missing(Place("page", 1, text))


def test_the_readme_is_one_that_a_newcomer_reads_to_its_end() -> None:
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()) <= 150
