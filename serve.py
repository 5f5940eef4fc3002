"""Serve runs over HTTP: an OpenAI-compatible API, a playground, and the pages of all runs at /runs.

python serve.py baseline                           # a playground at http://127.0.0.1:8000/, the API at /v1
python serve.py baseline wider --port 8080         # several runs, side by side in the playground
WORKBENCH_API_KEY=... python serve.py baseline --host 0.0.0.0
curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
    -d '{"model": "baseline", "prompt": "The ", "max_tokens": 50, "seed": 1}'
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from utils.errors import UserError
from utils.runs.find import find_export
from utils.serving.flags import add_arguments
from utils.terminal.cli import PROJECT_ROOT, Parser, script
from utils.terminal.config_flags import parse_experiment

API_KEY = "WORKBENCH_API_KEY"


@script
def main(argv: Sequence[str]) -> int:
    usage = "python serve.py [RUN ...] [--FLAG VALUE ...]"
    parser = Parser(prog="serve.py", usage=usage, description=__doc__)
    add_arguments(parser, API_KEY)
    parsed = parse_experiment(argv, parser, sections=("inference",))
    args, config = parsed.own, parsed.load().config
    key = os.environ.get(API_KEY)
    if key is not None and (not key or not key.isascii() or not key.isprintable() or " " in key):
        raise UserError(f"{API_KEY}: expected printable ASCII characters without spaces")
    runs_dir = PROJECT_ROOT / (args.runs_dir or config.tracking.runs_dir)
    words = args.runs or [""]
    exports = [find_export(word or None, runs_dir) for word in words]

    from utils.machine.device import one_thread
    from utils.serving.served import load_runs
    from utils.serving.server import serving_app
    from utils.web.app import exposure, run_server

    if note := exposure(args.host):
        key_words = "requires the API key" if key else f"requires no API key: {API_KEY} in the environment sets one"
        print(f"{note}; it {key_words}", file=sys.stderr)
    weights = args.quantize or args.weights
    with one_thread():  # so that OpenMP creates threads only for that of the engine
        runs = load_runs(words, exports, args.device, weights, config.inference, args.unknown_token)
        app = serving_app(runs, args.slots, args.queue, runs_dir, edit=args.edit, api_key=key, loopback=note is None)
    run_server(app, args.host, args.port)


if __name__ == "__main__":
    sys.exit(main())
