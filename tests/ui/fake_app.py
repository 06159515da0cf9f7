"""The real page on made-up numbers: `python tests/ui/fake_app.py PORT PAUSE_SECONDS`. For looking at screens without a model."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.ui.fakes import FakePipeline
from workbench.ui import page

if __name__ == "__main__":
    sys.modules["workbench.pipeline"] = FakePipeline(float(sys.argv[2]))
    page.launch("127.0.0.1", int(sys.argv[1]))
