"""Where a search leaves what it has measured: in a run folder, whole at any moment.

The states are written first and the table that names them last, each file in one piece: a process killed between any two writes leaves the
table before or the table after, and every state that table names.
"""

from __future__ import annotations

from workbench.runs import Run


class Checkpoints:
    """A search's last checkpoint in a run folder: the states first, the table that names them last."""

    def __init__(self, run: Run, key: str):
        self.run, self.key = run, key

    def save(self, table: dict, blobs: dict[str, bytes]) -> None:
        for name, blob in blobs.items():
            if not self.run.path("state", f"{self.key}-{name}").exists():
                self.run.save_blob("state", f"{self.key}-{name}", blob)
        self.run.save_json("search", self.key, {"table": table, "states": sorted(blobs)})
        for path in self.run.folder.glob(f"state-{self.key}-*.safetensors"):
            if path.stem.removeprefix(f"state-{self.key}-") not in blobs:
                path.unlink(missing_ok=True)

    def load(self) -> tuple[dict, dict[str, bytes]] | None:
        """(table, states), or None where there is no table; a state that is missing, or has a name that no file of a run can have, is
        left out."""
        found = self.run.load_json("search", self.key)
        try:
            table, names = found["table"], [str(name) for name in found["states"]]
        except (KeyError, TypeError):
            return None
        blobs = {name: self.run.load_blob("state", f"{self.key}-{name}") for name in names}
        return table, {name: blob for name, blob in blobs.items() if blob is not None}
