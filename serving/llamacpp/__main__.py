"""``python -m serving.llamacpp``: serve one GGUF model on loopback."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

import uvicorn

from serving.llamacpp.engine import Engine, EngineOptions
from serving.llamacpp.runtime import RuntimeFault
from serving.llamacpp.server import create_app

# Passed through the environment: a command line can be read by every user of the machine.
API_KEY_VARIABLE = "RIGSERVE_ENGINE_KEY"


def main() -> int:
    """Parse the command line, load the model, serve until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m serving.llamacpp", description=__doc__)
    parser.add_argument("--model-path", type=Path, required=True, help="GGUF file")
    parser.add_argument("--served-name", required=True, help="model name in responses")
    parser.add_argument("--port", type=int, required=True, help="loopback port to listen on")
    parser.add_argument("--context-length", type=int, default=4096, help="tokens per sequence")
    parser.add_argument("--max-sequences", type=int, default=16, help="slots")
    parser.add_argument("--max-queue", type=int, default=256, help="sequences that may wait")
    parser.add_argument("--max-batch-tokens", type=int, default=512, help="prompt tokens per step")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads")
    parser.add_argument("--gpu-layers", type=int, default=-1, help="layers on the GPU; -1: all")
    args = parser.parse_args()
    port = args.port
    del args.port
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return asyncio.run(_serve(EngineOptions(**vars(args)), port))


async def _serve(options: EngineOptions, port: int) -> int:
    try:
        engine = Engine(options)
    except RuntimeFault as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    app = create_app(engine, os.environ.get(API_KEY_VARIABLE))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host="127.0.0.1",
            port=port,
            loop="uvloop",
            http="httptools",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
        )
    )
    await server.serve()
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
