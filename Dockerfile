# The studio and its API in a container: `docker compose --profile cpu up`, see docs/how-to/container.md.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim-bookworm AS build
# Index of PyTorch's builds for CPUs only, for a smaller image. By default, torch comes from the usual index, with CUDA.
ARG TORCH_INDEX=""
ARG EXTRAS="serve"
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/venv/bin:$PATH
RUN python -m venv /opt/venv
WORKDIR /source
# torch is by far the largest layer, and changes less often than the sources.
COPY constraints.txt ./
RUN python -m pip install --constraint constraints.txt ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} torch
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY src ./src
RUN python -m pip install --constraint constraints.txt ".[${EXTRAS}]"

FROM python:${PYTHON}-slim-bookworm
RUN groupadd --gid 10001 kandinsky22 \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /state --shell /usr/sbin/nologin kandinsky22 \
    && install --directory --owner=10001 --group=10001 --mode=0750 /state
COPY --from=build /opt/venv /opt/venv
# Pictures, jobs, settings, caches and downloaded models are all below /state.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOME=/state \
    HF_HOME=/state/hub \
    XDG_CONFIG_HOME=/state/config \
    XDG_CACHE_HOME=/state/cache \
    KANDINSKY22_STATE=/state/studio
USER 10001:10001
WORKDIR /state
VOLUME /state
EXPOSE 7822
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:7822/healthz', timeout=4)"]
ENTRYPOINT ["kandinsky22"]
# All addresses of the container: what is published outside it is decided by compose.yaml. A token is required.
CMD ["serve", "--host", "0.0.0.0", "--port", "7822"]
