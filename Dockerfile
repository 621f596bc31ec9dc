# Two images of the same code:
#   docker build --target cuda --tag moetrain:cuda .
#   docker build --target cpu --tag moetrain:cpu --build-arg TORCH_INDEX=<index that holds the CPU builds of torch> .
# Without TORCH_INDEX the package index's own build of torch is taken; on x86 Linux that is the CUDA build, which the cpu target refuses.
#   docker run --gpus all --ipc host -v "$PWD/runs:/moetrain/runs" moetrain:cuda train +experiment=gpt_125m_8e
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS base
# gcc: torch.compile builds kernels at run time.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc g++ && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /moetrain

FROM base AS build
ARG TORCH=2.13.0
ARG TORCH_INDEX=
RUN python -m venv /opt/venv
COPY constraints.txt ./
# torch alone in its layer: it is the largest and changes least.
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} "torch==${TORCH}" hatchling
COPY pyproject.toml ./
COPY moetrain moetrain
COPY conf conf
RUN pip install --constraint constraints.txt "torch==${TORCH}" --no-build-isolation ".[hf,wandb]"

FROM base AS run
RUN useradd --create-home moetrain && chown moetrain /moetrain
COPY --from=build /opt/venv /opt/venv
COPY launch launch
USER moetrain
ENTRYPOINT ["moetrain"]
CMD ["--help"]

FROM run AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN python -c "import torch; assert torch.version.cuda, 'this torch has no CUDA; drop TORCH_INDEX'" && moetrain --help >/dev/null

FROM run AS cpu
RUN python -c "import torch; assert not torch.version.cuda, 'this is a CUDA build of torch; give TORCH_INDEX'" && moetrain --help >/dev/null
