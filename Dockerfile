# The package with all it needs, in an image for CPUs:
#
#   docker build -t torchtitan_style .
#
# or for NVIDIA GPUs:
#
#   docker build -t torchtitan_style:cuda --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 .
#
# TORCH_INDEX is where pip finds other builds of torch, as the much smaller ones for CPUs: see "Get Started" at
# PyTorch's site. Left out, torch is the build that pip takes by itself, which runs on both.
# BASE is any image of Debian or Ubuntu whose python3 is 3.10 or newer. How to run it: docs/installing.md.
ARG BASE=debian:bookworm-slim
FROM ${BASE}

# torch.compile builds kernels at run time: it needs a C++ compiler, and on GPUs Python's headers.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1
RUN python3 -m venv "$VIRTUAL_ENV"
WORKDIR /workspace

# torch, most of the image, in a layer of its own: a change of the code leaves it as it is.
ARG TORCH_INDEX=
COPY constraints.txt .
RUN pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --constraint constraints.txt torch

COPY . .
RUN pip install --constraint constraints.txt --editable .

# docker run IMAGE trains; docker run IMAGE generate … is another command.
ENTRYPOINT ["torchtitan-style"]
CMD ["train"]
