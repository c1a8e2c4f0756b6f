# rigserve for NVIDIA cards, RTX 20 to RTX 50: docker build -f docker/cuda.Dockerfile -t rigserve:cuda .
# docker/verify-cuda.sh shows on a machine with a card that it works. The first build takes half an hour or more.
# Reproducible as far as constraints.txt goes, which pins all Python packages; Ubuntu's come as they are now.
# 12.8 is the first that knows RTX 50, and needs a driver of 570 or newer.
ARG CUDA=12.8.1
ARG UBUNTU=ubuntu24.04

FROM nvidia/cuda:${CUDA}-devel-${UBUNTU} AS build
# Ubuntu keeps no old versions to pin.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/rigserve
# RTX 20, 30, 40 and 50; the last one as PTX, too, for what comes after. The driver's library is there when it runs.
ARG CUDA_ARCHITECTURES=75-real;86-real;89-real;120
ARG CMAKE_ARGS="-DGGML_NATIVE=off -DCMAKE_CUDA_ARCHITECTURES=${CUDA_ARCHITECTURES} -DCMAKE_EXE_LINKER_FLAGS=-Wl,--allow-shlib-undefined"
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY tools tools
COPY configs configs
COPY loadtest loadtest
COPY serving serving
RUN RIGSERVE_BUILD=cuda python3 -m tools.setup \
    && .venv/bin/python tools/sbom.py > sbom.json \
    && find . -name __pycache__ -prune -exec rm -rf {} + \
    && rm -f .venv/build.log

FROM nvidia/cuda:${CUDA}-runtime-${UBUNTU}
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 python3 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --home-dir /var/lib/rigserve --create-home rigserve \
    && install -d -o rigserve -g rigserve -m 0700 /var/cache/rigserve
COPY --from=build /opt/rigserve /opt/rigserve
ARG VERSION=dev
LABEL org.opencontainers.image.title="rigserve" \
      org.opencontainers.image.description="Private, metered LLMs behind an OpenAI-compatible API" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# All that is written goes to these two volumes and /tmp: the rest may be read-only.
ENV PATH=/opt/rigserve/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    HF_HOME=/var/cache/rigserve/huggingface
USER 10001
WORKDIR /var/lib/rigserve
VOLUME ["/var/lib/rigserve", "/var/cache/rigserve"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["rigserve"]
CMD ["serve", "/etc/rigserve/rig.yaml"]
