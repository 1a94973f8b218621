"""Time of `import pixclip_hf` against `from transformers import AutoModel, AutoProcessor`, a fresh process each."""

import json
import statistics
import subprocess
import sys
import time

STATEMENTS = {
    "transformers": "from transformers import AutoModel, AutoProcessor",
    "pixclip_hf": "import pixclip_hf",
}
REPEATS = 9


def seconds(statement: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", statement], check=True)
    return time.perf_counter() - start


def main() -> None:
    for statement in STATEMENTS.values():  # fills the disk cache and writes the bytecode
        seconds(statement)
    times = {name: [] for name in STATEMENTS}
    for _ in range(REPEATS):
        for name, statement in STATEMENTS.items():
            times[name].append(seconds(statement))
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"{'import':<14} {'median s':>9} {'min s':>9} {'max s':>9}")
    for name, values in times.items():
        print(f"{name:<14} {medians[name]:>9.3f} {min(values):>9.3f} {max(values):>9.3f}")
    print(json.dumps({"import_ratio": round(medians["pixclip_hf"] / medians["transformers"], 3)}))


if __name__ == "__main__":
    main()
