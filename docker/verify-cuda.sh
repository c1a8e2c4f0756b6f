#!/bin/sh
# Shows on a machine with an NVIDIA card that the CUDA image works: builds it, and has it answer on the card.
# Needs Docker with NVIDIA's container toolkit. Run from the project's folder: docker/verify-cuda.sh
set -eu
cd "$(dirname "$0")/.."
docker build --file docker/cuda.Dockerfile --tag rigserve:cuda .
name=rigserve-verify-$$
trap 'docker rm --force "$name" >/dev/null 2>&1 || true' EXIT
docker run --detach --name "$name" --gpus all --read-only --tmpfs /tmp --cap-drop ALL \
    --volume "$PWD/docker/rig.yaml:/etc/rigserve/rig.yaml:ro" rigserve:cuda >/dev/null
tries=0
until docker exec "$name" python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready')" 2>/dev/null; do
    tries=$((tries + 1))
    [ "$tries" -lt 120 ] || { docker logs "$name"; echo "FAILED: not ready after 2 minutes" >&2; exit 1; }
    sleep 1
done
docker exec "$name" python -c "
import llama_cpp
assert llama_cpp.llama_supports_gpu_offload(), 'llama.cpp was built without CUDA'"
key=$(docker exec "$name" rigserve keys create verify --config /etc/rigserve/rig.yaml --json | sed -n 's/.*"secret": "\(.*\)".*/\1/p')
docker exec "$name" python -c "
import json, urllib.request as u
head = {'authorization': 'Bearer $key', 'content-type': 'application/json'}
body = {'model': 'smollm2-135m', 'prompt': 'The sea', 'max_tokens': 16}
answer = u.urlopen(u.Request('http://127.0.0.1:8000/v1/completions', json.dumps(body).encode(), head))
assert json.load(answer)['usage']['completion_tokens'] > 0
series = u.urlopen(u.Request('http://127.0.0.1:8000/metrics', headers=head)).read().decode()
assert 'rigserve_gpu_power_watts{' in series, 'NVML tells nothing of the card'
on_card = [line for line in series.splitlines() if line.startswith('rigserve_engine_memory_bytes') and 'GPU-' in line]
assert on_card, 'the engine is not on the card'
print(*on_card, sep='\n')"
echo "OK: the image serves on the card"
