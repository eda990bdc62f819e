# The two commands in a container:
#     docker build -t hamdist . && docker run --rm --shm-size 1g hamdist            # scripts/demo
#     docker run --rm --shm-size 1g hamdist scripts/test                            # all tests
# Ray and the signals between actors live in /dev/shm, of which Docker gives 64 MiB by itself: hence --shm-size.
FROM python:3.11-slim-bookworm

# The compiler builds the C code for one row; without it torch does that work, slower at batch 1.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev procps \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home hamdist
USER hamdist
WORKDIR /home/hamdist/hamdist
ENV VIRTUAL_ENV=/home/hamdist/venv PATH=/home/hamdist/venv/bin:$PATH
RUN python -m venv "$VIRTUAL_ENV"

# torch by version, as in scripts/env: a build for processors where the index has one (PIP_EXTRA_INDEX_URL).
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL
# hadolint ignore=DL3013
RUN pip install --no-cache-dir "$TORCH"

COPY --chown=hamdist . .
RUN pip install --no-cache-dir --editable ".[dev]"

CMD ["scripts/demo"]
