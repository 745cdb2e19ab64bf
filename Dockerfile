# flowopd with its command line as entry point. For a CPU, or for CUDA with all that the wheels of PyPI bring:
#   docker build -t flowopd .
#   docker build -t flowopd:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run --rm -v "$PWD:/work" flowopd fit --config tiles/opd
#   docker run --rm --gpus all --shm-size 8g -v "$PWD:/work" -v "$HOME/.cache/huggingface:/cache" flowopd:cuda check --config sd35/opd
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=ocr,serve
ENV HF_HOME=/cache PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1

RUN pip install --index-url ${TORCH_INDEX} "torch>=2.8" "torchvision>=0.23"

WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY configs configs
COPY src src
RUN pip install ".[${EXTRAS}]"

WORKDIR /work
ENTRYPOINT ["flowopd"]
CMD ["--help"]
