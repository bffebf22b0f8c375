# clipflow_jax for TPUs: docker build --file launch/docker/tpu.Dockerfile --tag clipflow:tpu .
FROM python:3.12-slim
WORKDIR /clipflow
COPY setup.py pyproject.toml requirements.txt LICENSE ./
COPY clipflow_jax clipflow_jax
COPY configs configs
RUN pip install --no-cache-dir --constraint requirements.txt ".[tpu]"
# A container that sees no TPU ends, and does not go on by the CPU.
ENV JAX_PLATFORMS=tpu
# The process gets the signals itself: SIGTERM saves a checkpoint.
ENTRYPOINT []
CMD ["clipflow", "--help"]
