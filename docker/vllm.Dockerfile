# rigserve with vLLM, in an environment of its own, beside llama.cpp: docker build -f docker/vllm.Dockerfile -t rigserve:vllm .
# Models say `engine: vllm` and `environment: /opt/vllm/bin/python`. Build rigserve:cuda first.
ARG BASE=rigserve:cuda
# hadolint ignore=DL3006
FROM ${BASE}
ARG VLLM_VERSION=0.32.0
USER 0
# vLLM compiles kernels when it starts. Ubuntu keeps no old versions to pin.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/vllm \
    && /opt/vllm/bin/pip install --no-cache-dir "vllm==${VLLM_VERSION}" \
    && /opt/vllm/bin/python /opt/rigserve/tools/sbom.py > /opt/vllm/sbom.json
# Libraries that are compiled are kept; from /tmp, which Docker mounts with noexec, none could be loaded.
ENV VLLM_CACHE_ROOT=/var/cache/rigserve/vllm \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/rigserve/torchinductor \
    TRITON_CACHE_DIR=/var/cache/rigserve/triton
USER 10001
