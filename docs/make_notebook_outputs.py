"""Runs the notebooks and stores what they print and show, so that their pages have it without being run.

    python docs/make_notebook_outputs.py

After a change of a notebook or of the embedded model. Pictures are stored as JPEG, a tenth of the size of PNG.
"""

import base64
import io
import tempfile
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

NOTEBOOKS = Path(__file__).resolve().parent / "notebooks"


def stored(outputs):
    """``outputs`` of a cell as they are kept: text that follows text joined, pictures as JPEG, warnings left out."""
    kept = []
    for output in outputs:
        if "image/png" in output.get("data", {}):
            picture = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
            file = io.BytesIO()
            picture.convert("RGB").save(file, "JPEG", quality=80)
            data = {"image/jpeg": base64.b64encode(file.getvalue()).decode(), "text/plain": output.data["text/plain"]}
            output = nbformat.from_dict({**output, "data": data})
        elif output.get("name") == "stderr":
            continue
        elif kept and output.get("name") == "stdout" == kept[-1].get("name"):
            kept[-1].text += output.text
            continue
        kept.append(output)
    return kept


def execute(path: Path) -> nbformat.NotebookNode:
    """The notebook at ``path`` after a run in an empty folder."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        client = nbclient.NotebookClient(
            notebook, timeout=3600, record_timing=False, resources={"metadata": {"path": folder}}
        )
        client.execute()
    return notebook


if __name__ == "__main__":
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        metadata = nbformat.read(path, as_version=4).metadata
        notebook = execute(path)
        notebook.metadata = metadata  # without the version of this machine's Python
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = stored(cell.outputs)
        path.write_text(nbformat.writes(notebook) + "\n", "utf-8")
        print(f"wrote {path}")
