"""What `import bn_c` adds to `import numpy`: at most 15 ms of CPU, 3 MB of memory; its size: at most 1.5 MB.

The same of PyTorch and ONNX Runtime, where they are installed.
"""

import statistics
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

MEASURE = """
import time, numpy
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
memory, start = resident(), time.process_time()
import {}
print((time.process_time() - start) * 1e3, (resident() - memory) / 1e6)
"""
LIMITS = (15, 3, 1.5)  # ms, MB, MB


def measure(package):
    """Milliseconds of CPU time, megabytes in memory and megabytes on disk; medians of several processes."""
    command = [sys.executable, "-c", MEASURE.format(package)]
    runs = [[float(value) for value in subprocess.check_output(command, text=True).split()] for _ in range(9)]
    (folder,) = find_spec(package).submodule_search_locations
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return *(statistics.median(values) for values in zip(*runs, strict=True)), size / 1e6


def main():
    for package in filter(find_spec, ("onnxruntime", "torch", "bn_c")):
        values = cpu, memory, disk = measure(package)
        print(f"import {package} adds {cpu:.1f} ms of CPU and {memory:.1f} MB to import numpy; {disk:.1f} MB on disk")
    return 0 if all(value <= limit for value, limit in zip(values, LIMITS, strict=True)) else 1


if __name__ == "__main__":
    sys.exit(main())
