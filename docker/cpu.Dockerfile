# rigserve for a machine without a GPU: docker build -f docker/cpu.Dockerfile -t rigserve:cpu .
# Reproducible as far as constraints.txt goes, which pins all Python packages; Debian's come as they are now.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
# Debian keeps no old versions to pin.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ make \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/rigserve
# For any processor with AVX2; -DGGML_NATIVE=on builds for the very one that builds.
ARG CMAKE_ARGS=-DGGML_NATIVE=off
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY tools tools
COPY configs configs
COPY loadtest loadtest
COPY serving serving
RUN RIGSERVE_BUILD=cpu python -m tools.setup \
    && .venv/bin/python tools/sbom.py > sbom.json \
    && find . -name __pycache__ -prune -exec rm -rf {} + \
    && rm -f .venv/build.log

FROM ${PYTHON_IMAGE}
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends libgomp1 libstdc++6 \
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
