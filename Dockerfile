# One image for shards and workers: `python -m ps_server`, or any script that uses shardline.
#
#   make image                                          shardline:dev
#   make image IMAGE=shardline:gpu TARGET=gpu
#   make wheelhouse && make image WHEELHOUSE=wheelhouse     the second without internet
#
# WHEELHOUSE is a folder beside this file with a wheel of everything that is installed.
ARG PYTHON=python:3.11-slim-bookworm

FROM ${PYTHON} AS build
ARG WHEELHOUSE=
ENV PATH=/opt/shardline/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
COPY constraints.txt ${WHEELHOUSE:-constraints.txt} /wheels/
RUN if [ -n "$WHEELHOUSE" ]; then \
        printf '[global]\nno-index = true\nfind-links = /wheels\n' > /etc/pip.conf; \
    fi; \
    python -m venv /opt/shardline
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
# What rarely changes comes first: all that the project needs, then the project itself.
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
        extras = project['optional-dependencies']; \
        print(*project['dependencies'], *extras['plots'], *extras['examples'], sep='\n')" > needs.txt

FROM build AS build-cpu
RUN pip install -c /wheels/constraints.txt --index-url https://download.pytorch.org/whl/cpu \
        --extra-index-url https://pypi.org/simple torch==2.13.0 \
    && pip install -c /wheels/constraints.txt -r needs.txt setuptools
COPY . .
RUN pip install --no-deps --no-build-isolation .

FROM ${PYTHON} AS runtime
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="shardline" \
      org.opencontainers.image.description="Sharded parameter servers, all-reduce and pipelines for PyTorch" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# Containers run with a read-only root: they write to /runs, a volume, and to /tmp, in memory.
RUN mkdir /runs && chown 65532:65532 /runs
COPY examples /examples
ENV PATH=/opt/shardline/bin:$PATH \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SHARDLINE_METRICS_HOST=0.0.0.0 \
    SHARDLINE_METRICS_PORT=9400 \
    SHARDLINE_SERVER_HOST=0.0.0.0
EXPOSE 7000 9400
USER 65532:65532
WORKDIR /runs
# Of a shard; a worker takes no calls, and is started without (docker run --no-healthcheck).
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s CMD ["python", "-P", "-m", "ps_server.probe"]
# With -P nothing is imported from the working directory, which workers write to.
CMD ["python", "-P", "-m", "ps_server"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/shardline /opt/shardline

FROM build AS build-gpu
RUN pip install -c /wheels/constraints.txt torch==2.13.0 \
    && pip install -c /wheels/constraints.txt -r needs.txt setuptools
COPY . .
RUN pip install --no-deps --no-build-isolation .

# torch's wheel brings CUDA; the driver comes from the machine, through NVIDIA's container toolkit.
FROM runtime AS gpu
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/shardline /opt/shardline
