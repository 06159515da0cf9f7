"""Start the workbench in the browser: `python app.py [--port N] [--host ADDRESS]`, or `adatsq serve`.

The port is bound before gradio and torch are imported; the embedded model loads in the background and needs no click.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing leaves this machine
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", 7860)))
    parser.add_argument("--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    args = parser.parse_args()
    from workbench import tuning
    from workbench.ui.splash import Splash

    tuning.tune()
    # A Ctrl-C that arrives while libraries are imported can be swallowed by them. Files are written atomically: just stop.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        splash = Splash(args.host, args.port)
    except (OSError, OverflowError) as error:
        sys.exit(f"error: cannot listen on {args.host}:{args.port} ({error}); choose another port with --port")
    from workbench import zerogpu  # noqa: F401 - on a Space it brings `spaces`, which must come before torch
    from workbench.ui import page

    page.launch(args.host, args.port, when_built=splash.close)


if __name__ == "__main__":
    main()
