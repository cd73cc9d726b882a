"""Every op on a GPU: reference, torch.compile, Triton and CUDA side by side, against the copy bandwidth of the run.

    python -m bench.ops.gpu [--op router_score] [--budget 180] [--out FILE] [--dry]

The budget in seconds is shared among the cases; what does not fit is named as not measured. `--dry` needs no GPU: it
runs the gates of small cases in Triton's interpreter and times nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def gates_only(ops: list[str]) -> list[dict[str, Any]]:
    import torch

    from bench.ops.gpu_cases import OPS
    from tests.kernels.interpreter import mend

    mend()
    results = []
    for op in ops:
        for case in OPS[op](torch.device("cpu"), True):
            for gate in case.gates.values():
                gate()
            results.append({"case": case.name, "variants": {name: {} for name in case.gates}})
    return results


def timed(ops: list[str], budget: float, document: dict[str, Any], out: Path | None) -> None:
    """Puts results, what the budget left no time for and the copy bandwidth into the document, which is written to
    `out` after each case: a visit may end at any time."""
    import torch

    from bench.ops.gpu_cases import OPS
    from bench.ops.gpu_harness import copy_bandwidth, measure, table, write

    device, end = torch.device("cuda"), time.perf_counter() + budget
    torch.cuda.init()
    bandwidth = copy_bandwidth(device)
    results: list[dict[str, Any]] = []
    skipped: list[str] = []
    document |= {"cases": results, "not_measured": skipped, "copy_gb_per_s": round(bandwidth / 1e9, 1)}
    for i, op in enumerate(ops):
        share = (end - time.perf_counter()) / (len(ops) - i)
        if share < 2:
            skipped.append(op)
            continue
        op_end = time.perf_counter() + share
        try:
            for case in OPS[op](device, False):
                if time.perf_counter() > op_end:
                    skipped.append(case.name)
                    continue
                with torch.inference_mode():
                    results.append(measure(case, min(1.5, share / 8), bandwidth))
                print(table(results[-1:]), flush=True)
                if out:
                    write(out, document)
                del case
                torch.cuda.empty_cache()
        except Exception as e:  # one broken op must not cost the others their visit
            failed = f"{type(e).__name__}: {str(e)[:300]}"
            results.append({"case": op, "bytes": 0, "variants": {"cases": {"failed": failed}}})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--op", action="append")
    parser.add_argument("--budget", type=float, default=180)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    if args.dry:
        os.environ["TRITON_INTERPRET"] = "1"
    from bench.ops.gpu_cases import OPS
    from bench.ops.gpu_harness import machine, table, write

    ops = args.op or list(OPS)
    if unknown := set(ops) - set(OPS):
        print(f"--op: {', '.join(sorted(unknown))} is not one of {', '.join(OPS)}", file=sys.stderr)
        return 2
    document: dict[str, Any] = {"machine": machine(), "dry": args.dry}
    if args.dry:
        document["cases"] = gates_only(ops)
    else:
        timed(ops, args.budget, document, args.out)
    if args.out:
        write(args.out, document)
    print(table(document["cases"]))
    print(json.dumps(document))
    return 1 if any("failed" in v for r in document["cases"] for v in r["variants"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
