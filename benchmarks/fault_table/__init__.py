"""The rows of the fault table, which `benchmarks/faults.py` tries."""
