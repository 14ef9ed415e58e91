"""The demo's default corpus: documentation that is installed on this machine.

Docstrings of the standard library and of installed packages, read with `ast` and never by
importing, and the README texts in package metadata. Which documents are taken is a function of what
is installed: files in the order of a hash.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from email.message import Message
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any, cast

_MIN_CHARACTERS = 400
_MAX_FILE_BYTES = 2 << 20


def installed_documents(max_bytes: int) -> Iterator[dict[str, Any]]:
    """Loose JSON records {id, src, title, text}, READMEs and modules mixed, until their texts reach
    max_bytes."""
    total = 0
    for key in sorted(
        [*_readmes(), *_modules()], key=lambda key: hashlib.sha256(key[0].encode()).digest()
    ):
        name, location = key
        text = (
            _readme_text(location)
            if not isinstance(location, Path)
            else _docstrings(name, location)
        )
        if len(text) < _MIN_CHARACTERS:
            continue
        total += len(text.encode())
        if total > max_bytes:
            return
        yield {
            "id": name,
            "src": "readme" if not isinstance(location, Path) else "docstrings",
            "text": text,
        }


def _readmes() -> Iterator[tuple[str, Distribution]]:
    found = {f"{dist.metadata['Name']} {dist.version}": dist for dist in distributions()}
    yield from found.items()


def _readme_text(distribution: Distribution) -> str:
    metadata = cast(Message, distribution.metadata)
    body = metadata.get_payload()
    return (body if isinstance(body, str) else "") or str(metadata.get("Description") or "")


def _modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of all Python files of the standard library and the installed
    packages."""
    paths = sysconfig.get_paths()
    packages, library = Path(paths["purelib"]), Path(paths["stdlib"])
    for root in (library, packages):
        for file in root.rglob("*.py"):
            parts = file.relative_to(root).with_suffix("").parts
            if root is library and "site-packages" in parts:
                continue
            yield ".".join(part for part in parts if part != "__init__"), file


def _docstrings(module: str, file: Path) -> str:
    """The module's docstrings with the qualified names they belong to; "" if the file cannot be
    parsed."""
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            return ""
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    parts = list(_documented(tree, module))
    return "\n\n".join(parts) if any("\n" in part for part in parts) else ""


def _documented(node: ast.AST, name: str) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield f"{name}\n{docstring}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _documented(child, f"{name}.{child.name}")
