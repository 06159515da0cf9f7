"""What several tests share: the environment, one loaded model for the whole session, and where the browser is."""

import os
import shutil
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from workbench import tuning  # noqa: E402

tuning.tune()  # before torch starts its threads

import pytest  # noqa: E402

BROWSERS = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def bundle():
    """The embedded model, loaded once. A test that changes it must put it back."""
    from workbench.models import sources
    from workbench.options import ModelSpec

    return sources.load(ModelSpec())


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a browser; skips where there is none, unless REQUIRE_BROWSER is set."""
    for name in BROWSERS:
        if found := shutil.which(name):
            return found
    if os.environ.get("REQUIRE_BROWSER"):
        pytest.fail(f"REQUIRE_BROWSER is set and none of {', '.join(BROWSERS)} is installed")
    pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
