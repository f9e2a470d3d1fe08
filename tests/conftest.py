"""Every test runs offline, on two threads, under the Hypothesis profile that FXQUANT_HYPOTHESIS names (fast or slow)."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TORCHINDUCTOR_SIZE_ASSERTS"] = os.environ["TORCHINDUCTOR_ALIGNMENT_ASSERTS"] = "1"  # off by our default

import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))  # `from strategies import ...`: pytest's importlib mode adds no paths

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # one each where workers share the machine

for name, examples in {"fast": 25, "slow": 250}.items():
    settings.register_profile(
        name, max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
    )
settings.load_profile(os.environ.get("FXQUANT_HYPOTHESIS", "fast"))
