"""A page within a moment of the start: binds the port while the interface is still being imported, then gives it up.

Importing gradio alone takes seconds. The page asks again until the real one answers, and then loads it.
"""

from __future__ import annotations

import http.server
import threading

PAGE = b"""<!doctype html><html lang="en"><meta charset="utf-8"><title>AdaTSQ Workbench</title>
<link rel="icon" href="data:,"><style>body{font-family:system-ui,sans-serif;margin:20vh auto;max-width:32em;text-align:center}
@media(prefers-color-scheme:dark){body{background:#0b0f19;color:#e5e7eb}}</style>
<h1>AdaTSQ Workbench</h1><p role="status">is starting; this page opens it as soon as it is ready.</p>
<iframe id="probe" hidden></iframe><script>
const probe = document.getElementById('probe');  // a frame that finds nobody says so to no console, unlike fetch
probe.onload = () => { try { if (probe.contentDocument.body.textContent.length > 2) location.reload(); } catch { } };
setInterval(() => { probe.src = '/config?' + Date.now(); }, 400);</script></html>"""


class _Starting(http.server.BaseHTTPRequestHandler):
    """Answers the start page at /, nothing yet at /config, and "not yet" everywhere else."""

    def do_GET(self):
        path = self.path.split("?")[0]
        found = path == "/"
        self.send_response(200 if found else 204 if path == "/config" else 503)
        self.send_header("X-Starting", "1")
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(PAGE) if found else 0))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if found and self.command == "GET":
            self.wfile.write(PAGE)

    do_HEAD = do_GET

    def log_message(self, *args):
        """Quiet: these requests say nothing."""


class Splash:
    """Holds the port from construction until `close`. Raises OSError where the port is taken."""

    def __init__(self, host: str, port: int):
        self._server = http.server.ThreadingHTTPServer((host, port), _Starting)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
