"""A visit with the real `spaces` package, as on a ZeroGPU Space: `test_space.py` runs this file in a process of its own.

Served here: the device API that `spaces` asks for a GPU. Replaced in the worker: what would initialize CUDA and move tensors to it, so
that its "GPU" is this machine's CPU. Everything else is the package's own: the fork, its queues, its torch modes, which belong to one
thread, and a worker that is used again. The work is done in a thread, as the app does it. Prints what happened, as JSON.
"""

import json
import multiprocessing
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

asked = []


class DeviceApi(BaseHTTPRequestHandler):
    """One GPU, which is idle whenever somebody asks."""

    def do_POST(self):
        path = self.path.partition("?")[0]
        asked.append(path)
        body = json.dumps({"idle": True, "nvidiaIndex": 0, "nvidiaUUID": "GPU-0", "allowToken": "token"} if path == "/schedule" else {})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", 0), DeviceApi)
threading.Thread(target=server.serve_forever, daemon=True).start()
os.environ |= {"SPACES_ZERO_GPU": "true", "SPACES_ZERO_DEVICE_API_URL": f"http://127.0.0.1:{server.server_address[1]}"}

import numpy  # noqa: E402
import torch  # noqa: E402


def never() -> bool:
    return False


if torch.version.cuda is None:  # what `spaces` looks for in a build for CUDA
    torch.version.cuda, torch._C._cuda_init, torch.cuda._is_in_bad_fork = "12.8", never, never

from spaces.zero import torch as zero_torch  # noqa: E402

from workbench import zerogpu  # noqa: E402
from workbench.options import Budget, Cancelled, SearchConfig, SensitivityConfig, TraceConfig  # noqa: E402

zero_torch.init = zero_torch.move = lambda *_, **__: None


def visit() -> dict:
    """Load, profile, search, quantize, draw, cancel, draw again."""
    pipeline, seen = zerogpu.stages(), []
    bundle = pipeline.load("emoji-flux")
    trace = TraceConfig(prompts=tuple(bundle.prompts("showcase")[:2]), steps=4)
    found = pipeline.profile(bundle, trace, SensitivityConfig(probes=1), on_progress=seen.append)
    result = pipeline.search(bundle, found, Budget(max_weight_bytes=9_000_000, max_mean_act_bits=5),
                             SearchConfig(beam=1, samples=2, finalists=1, refine=0, rivals="uniform"))
    quantized = pipeline.quantize(bundle, found, result.chosen.plan)
    compared = pipeline.compare(bundle, quantized, trace.prompts, 0, 4)
    stopped = []

    def stop(progress):
        stopped.append(progress)
        raise Cancelled("enough")
    try:
        pipeline.profile(bundle, trace, SensitivityConfig(probes=1), on_progress=stop)
    except Cancelled:
        stopped.append("cancelled")
    again = pipeline.compare(bundle, quantized, trace.prompts, 0, 4)
    same = all(numpy.array_equal(getattr(pair, side), getattr(other, side)) for pair, other in zip(compared.pairs, again.pairs)
               for side in ("image_float", "image_quantized"))
    own = [layer.name for layer in bundle.layers if found.bank.linears[layer.name] is not bundle.linear(layer.name)]
    return {"cuda_seen_by_the_app": torch.cuda.is_available(), "device": str(bundle.device), "layers_of_another": own,
            "progress": len(seen), "psnr_db": compared.metrics["psnr_db"].mean, "same_images": same, "stopped": len(stopped),
            "asked": asked}


def work(answer: list) -> None:
    try:
        answer.append(visit())
    except BaseException as error:
        answer.append({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    answer: list = []
    thread = threading.Thread(target=work, args=(answer,))
    thread.start()
    thread.join()
    print(json.dumps(answer[0]), flush=True)
    for worker in multiprocessing.active_children():
        worker.kill()
    os._exit(0 if "error" not in answer[0] else 1)
