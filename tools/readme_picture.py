"""Write docs/family.png, the README's picture: the last figure of lesson 00, as stored there."""

import base64
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "docs" / "family.png"


def picture() -> bytes:
    notebook = nbformat.read(ROOT / "notebooks" / "00_llama_family.ipynb", as_version=4)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    return base64.b64decode([o.data["image/png"] for o in outputs if "image/png" in o.get("data", {})][-1])


if __name__ == "__main__":
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_bytes(picture())
