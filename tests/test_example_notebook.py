"""The example notebook runs as it stands, in a kernel, and shows what it promises."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "examples" / "one_claim.ipynb"


def test_the_notebook_runs_and_comes_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[]] * len(code)
    NotebookClient(notebook, kernel_name="python3", timeout=120, allow_errors=False).execute()
    kinds = [set(output.data) for cell in code for output in cell.outputs if "data" in output]
    assert any("image/svg+xml" in kind for kind in kinds)
    said = "\n".join(str(output.get("data", {})) for cell in code for output in cell.outputs)
    assert "**shown**" in said
    assert "by hand 0.2" in said
    assert not any(output.output_type == "stream" for cell in code for output in cell.outputs)
