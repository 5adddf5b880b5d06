# The offline tools: mindformers-ckpt without MindSpore.
#   docker build -t mindformers-ckpt .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" mindformers-ckpt inspect llama_1to8
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml setup.cfg README.md LICENSE ./
COPY mindformers_ckpt ./mindformers_ckpt
RUN pip wheel --no-cache-dir --wheel-dir /wheels ".[fingerprint,object-storage]"

FROM python:3.12-slim
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --no-index /wheels/*.whl
# Checkpoints are mounted here. What is written belongs to whom `docker run --user` names.
WORKDIR /work
USER 65534
ENTRYPOINT ["mindformers-ckpt"]
CMD ["--help"]
