"""Images as lossless PNG files of a session, so that a browser fetches each once and compares exact pixels."""

from __future__ import annotations

import hashlib
from pathlib import Path

from workbench.ui.session import Session


def address(session: Session, image) -> str:
    """Where the browser finds an image, uint8 (H, W, 3). Same pixels, same file; the folder's name is as secret as the session."""
    return f"/gradio_api/file={write(session, image)}"


def write(session: Session, image) -> Path:
    """The lossless file of an image among the session's downloads."""
    from PIL import Image

    name = hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()[:24] + ".png"
    path = session.downloads / name
    if not path.exists():
        part = path.with_suffix(".part")
        Image.fromarray(image).save(part, "PNG", compress_level=3)
        part.replace(path)
    return path


def png(image) -> bytes:
    """An image as the bytes of a PNG."""
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
