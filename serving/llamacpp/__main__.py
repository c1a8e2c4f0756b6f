"""``python -m serving.llamacpp``: serve one GGUF model on loopback."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import sys
import time
from pathlib import Path
from typing import get_args

import uvicorn
import uvloop
from starlette.applications import Starlette

from serving.llamacpp.adapters import AdapterFile
from serving.llamacpp.embedder import Embedder
from serving.llamacpp.embedding_server import create_embedding_app
from serving.llamacpp.engine import Engine, EngineOptions
from serving.llamacpp.runtime import KvType, Model, RuntimeFault, pooling_of
from serving.llamacpp.server import create_app
from serving.llamacpp.speculation import SpeculationKind
from serving.protocol.errors import ApiError

_log = logging.getLogger("serving.llamacpp")

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
    parser.add_argument("--kv-type", choices=get_args(KvType), default="F16", help="of the cache")
    parser.add_argument(
        "--flash-attention", choices=("on", "off"), default="on", help="on: where there is a kernel"
    )
    parser.add_argument("--kv-tokens", type=int, help="KV cells in all; default: slots x context")
    parser.add_argument(
        "--prefix-cache-mib", type=int, default=1024, help="main memory for prefixes"
    )
    parser.add_argument("--speculation", choices=get_args(SpeculationKind), default="none")
    parser.add_argument("--projector-path", type=Path, help="GGUF file (mmproj), to see images")
    parser.add_argument("--draft-model-path", type=Path, help="GGUF file, for draft_model")
    parser.add_argument("--step-timeout-seconds", type=float, default=120, help="then it is stuck")
    parser.add_argument(
        "--adapter",
        dest="adapters",
        type=AdapterFile.parse,
        action="append",
        default=[],
        metavar="NAME=PATH[:SCALE]",
        help="a LoRA adapter (GGUF) and its model name; may be repeated",
    )
    args = parser.parse_args()
    port = args.port
    del args.port
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(EngineOptions(**vars(args)), port))


async def _open(options: EngineOptions, model: Model) -> tuple[Engine | Embedder, Starlette]:
    """What serves the model, and its HTTP face, by the kind of model that the file says it is."""
    api_key = os.environ.get(API_KEY_VARIABLE)
    pooling = pooling_of(model)
    if pooling is not None:
        embedder = Embedder(options, model, pooling)
        return embedder, create_embedding_app(embedder, api_key)
    engine = Engine(options, model)
    for adapter in options.adapters:
        await engine.adapters.add(adapter)
    return engine, create_app(engine, api_key)


async def _serve(options: EngineOptions, port: int) -> int:
    began_at = time.monotonic()
    try:
        model = Model(options.model_path, options.gpu_layers)
        engine, app = await _open(options, model)
    except (RuntimeFault, ApiError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 1
    _log.info(
        "loaded %s in %.1f s: %d sequences of %d tokens, threads: %d",
        *(options.model_path.name, time.monotonic() - began_at),
        *(options.max_sequences, options.context_length, options.threads),
    )
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            host="127.0.0.1",
            port=port,
            http="httptools",
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=1,
        )
    )
    # A collection holds up a step: what is there for good is none of its business.
    gc.collect()
    gc.freeze()
    await server.serve()
    engine.close()
    _log.info("ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
