# clipflow_jax for NVIDIA GPUs: docker build --file launch/docker/gpu.Dockerfile --tag clipflow:gpu .
# CUDA, cuDNN and NCCL come with JAX's wheels; the host needs the NVIDIA driver and container toolkit only.
FROM python:3.12-slim
WORKDIR /clipflow
COPY setup.py pyproject.toml requirements.txt LICENSE ./
COPY clipflow_jax clipflow_jax
COPY configs configs
RUN pip install --no-cache-dir --constraint requirements.txt ".[gpu]"
ENV XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
# The process gets the signals itself: SIGTERM saves a checkpoint.
ENTRYPOINT []
CMD ["clipflow", "--help"]
