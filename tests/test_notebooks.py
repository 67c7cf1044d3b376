"""The notebooks run unchanged in an empty folder, and their stored outputs are those of a run."""

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def output_texts(cells) -> list[str]:
    """What each code cell prints, without the figures, which round otherwise elsewhere; its pictures' sizes."""
    return [
        "".join(
            f"{output['data']['text/plain']}\n" if "data" in output else re.sub(r"\d+(\.\d+)?", "#", output["text"])
            for output in cell.outputs
            if output.get("name") != "stderr"
        )
        for cell in cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs_offline(path: Path, tmp_path: Path, monkeypatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    before = output_texts(notebook.cells)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 6
    text = "".join(output.get("text", "") for output in outputs)
    assert "-> tokens (1, " in text and text.count("PSNR") >= 2
    assert list(tmp_path.iterdir()) == []
    assert output_texts(notebook.cells) == before, "run docs/make_notebook_outputs.py"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_stored_pictures_have_their_stated_sizes(path: Path) -> None:
    nbformat = pytest.importorskip("nbformat")
    outputs = [o.data for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", ()) if "data" in o]
    for data in outputs:
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/jpeg"])))
        assert f"size={picture.width}x{picture.height}" in data["text/plain"]
    assert len(outputs) >= 6 and path.stat().st_size < 1_000_000


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_links_of_notebooks_resolve(path: Path) -> None:
    import json

    text = "".join("".join(cell["source"]) for cell in json.loads(path.read_text("utf-8"))["cells"])
    links = re.findall(r"\]\((\.\.?/[^)]+)\)", text)
    assert links and [link for link in links if not (path.parent / link).is_file()] == []
