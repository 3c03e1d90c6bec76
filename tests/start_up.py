"""What `import bn_c` adds to `import numpy`: at most 15 ms and 3 MB of resident memory."""

import statistics
import subprocess
import sys

MEASURE = """
import time, numpy
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096
memory, start = resident(), time.perf_counter()
import bn_c
print((time.perf_counter() - start) * 1e3, (resident() - memory) / 1e6)
"""


def main():
    runs = [
        [float(value) for value in subprocess.check_output([sys.executable, "-c", MEASURE], text=True).split()]
        for _ in range(9)
    ]
    milliseconds, megabytes = (statistics.median(values) for values in zip(*runs, strict=True))
    print(f"import bn_c adds {milliseconds:.1f} ms and {megabytes:.1f} MB to import numpy")
    return 0 if milliseconds <= 15 and megabytes <= 3 else 1


if __name__ == "__main__":
    sys.exit(main())
