"""xlpk: a laboratory for GPU-resident LLM inference."""

__version__ = "0.1.0"
