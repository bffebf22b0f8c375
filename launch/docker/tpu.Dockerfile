# clipflow_jax for TPUs: docker build --file launch/docker/tpu.Dockerfile --tag clipflow:tpu .
FROM python:3.12-slim
WORKDIR /clipflow
COPY setup.py pyproject.toml requirements.txt LICENSE ./
COPY clipflow_jax clipflow_jax
COPY configs configs
RUN pip install --no-cache-dir --constraint requirements.txt ".[tpu]"
# The process gets the signals itself: SIGTERM saves a checkpoint.
ENTRYPOINT []
CMD ["clipflow", "--help"]
