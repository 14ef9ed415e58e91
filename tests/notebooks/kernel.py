"""The stored notebooks, and a Jupyter kernel that runs them head to tail."""

import html
import re
from ast import literal_eval
from contextlib import contextmanager
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("index_qa", "training_report")
_CLEAN = """\
%reset -f
import os
for name in [name for name in os.environ if name.startswith("RETROMILL_") and "CACHE" not in name]:
    del os.environ[name]
os.environ.update({})
"""


def stored(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", nbformat.NO_CONVERT)


class Kernel:
    """One process for all runs, as its imports take longest; names of an earlier run are gone."""

    def __init__(self, client):
        self._client = client

    def run(self, name, **variables):
        """The executed notebook; variables are RETROMILL_..., without that."""
        given = {f"RETROMILL_{name.upper()}": str(value) for name, value in variables.items()}
        notebook = stored(name)
        self._execute(nbformat.v4.new_notebook(cells=[_code(_CLEAN.format(given))]))
        return self._execute(notebook)

    def ask(self, code):
        """The value of the last expression of more code after a run."""
        return last_value(self._execute(nbformat.v4.new_notebook(cells=[_code(code)])))

    def _execute(self, notebook):
        self._client.nb = notebook
        self._client.reset_execution_trackers()
        for number, cell in enumerate(notebook.cells):
            self._client.execute_cell(cell, number)
        return notebook


def _code(source):
    return nbformat.v4.new_code_cell(source)


@contextmanager
def running_kernel():
    """The environment of the tests holds in the kernel."""
    client = NotebookClient(
        nbformat.v4.new_notebook(), timeout=120, resources={"metadata": {"path": str(FOLDER)}}
    )
    with client.setup_kernel():
        yield Kernel(client)


def outputs(notebook, kind):
    """All outputs of a MIME type, in order."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.data[kind] for output in found if kind in output.get("data", {})]


def last_value(notebook):
    return literal_eval(outputs(notebook, "text/plain")[-1])


def shown_text(markup):
    """What a reader sees of HTML."""
    return html.unescape(re.sub("<[^>]+>", "", markup))


def page(notebook):
    """All text that a reader sees in tables and paragraphs."""
    parts = outputs(notebook, "text/html") + outputs(notebook, "text/markdown")
    return "\n".join(shown_text(part) for part in parts)
