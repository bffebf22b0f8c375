# clipflow_jax for NVIDIA GPUs: docker build --file launch/docker/gpu.Dockerfile --tag clipflow:gpu .
# CUDA, cuDNN and NCCL come with JAX's wheels; the host needs the NVIDIA driver and container toolkit only.
FROM python:3.12-slim
WORKDIR /clipflow
COPY setup.py pyproject.toml requirements.txt LICENSE ./
COPY clipflow_jax clipflow_jax
COPY configs configs
RUN pip install --no-cache-dir --constraint requirements.txt ".[gpu]"
# LD_LIBRARY_PATH: GKE mounts the host's driver there and tells nobody; container toolkits find their own place.
# JAX_PLATFORMS: a container that sees no GPU ends, and does not go on by the CPU.
ENV LD_LIBRARY_PATH=/usr/local/nvidia/lib64 JAX_PLATFORMS=cuda
# The process gets the signals itself: SIGTERM saves a checkpoint.
ENTRYPOINT []
CMD ["clipflow", "--help"]
