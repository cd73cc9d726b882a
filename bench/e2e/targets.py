"""What the project promises about this bench, judged on a result; only what was measured is judged."""

from __future__ import annotations

from typing import Any

from bench.e2e.cells import BATCH
from bench.peers.catalogue import OURS

RATIOS = {
    "hf_reprefill": 10.0,
    "hf_cached": 3.0,
    "vllm_cpu": 2.0,
    "llama_cpp": 1.5,
    "hf_continuous": 1.5,
    "openvino_genai": 1.5,
}
PLAIN = {"decode_1": 1.0, f"decode_{BATCH}": 1.5, "prefill": 1 / 0.7, "warm": 1.0}  # how much faster than the best peer
NANO_RATE, NANO_RATIO = 20_000.0, 15.0  # at 256 in flight
GPU_CEILING, GPU_RATIO = 0.7, 3.0  # the random Qwen3 pair, 64 in flight
BANDWIDTH, OVERHEAD, EXTRA_FLOPS = 0.8, 0.05, 0.15


def judged(found: dict[str, Any]) -> list[dict[str, Any]]:
    """[{"what", "wanted", "got", "reached"}]; empty for pairs, devices and busy machines that promise nothing here."""
    out: list[dict[str, Any]] = []
    if found.get("neighbours"):
        return out

    def at_least(what: str, got: float, wanted: float) -> None:
        out.append({"what": what, "wanted": f">= {wanted:.4g}", "got": round(got, 3), "reached": got >= wanted})

    def at_most(what: str, got: float, wanted: float) -> None:
        out.append({"what": what, "wanted": f"<= {wanted:.4g}", "got": round(got, 4), "reached": got <= wanted})

    main = found["workloads"][found["main"]]["engines"]
    if found["device"] != "cpu":
        if found["pair"] == "qwen3" and OURS in main:
            at_least("share of the ceiling", main[OURS]["fraction_of_ceiling"], GPU_CEILING)
            for peer in (p for p in main if "ours_over_this" in main[p]):
                at_least(f"answers/s over {peer}", main[peer]["ours_over_this"], GPU_RATIO)
        return out
    if found["pair"] == "nano":
        if OURS in main:
            at_least("nano tokens/s", main[OURS]["tokens_per_second"], NANO_RATE)
        if "ours_over_this" in main.get("hf_reprefill", {}):
            at_least("answers/s over hf_reprefill", main["hf_reprefill"]["ours_over_this"], NANO_RATIO)
    if found["pair"] != "smol":
        return out
    for peer, wanted in RATIOS.items():
        if "ours_over_this" in main.get(peer, {}):
            at_least(f"answers/s over {peer}", main[peer]["ours_over_this"], wanted)
    ours = main.get(OURS, {})
    if "forward_flops_over_least" in ours:
        at_most("FLOPs beyond exact catch-up", ours["forward_flops_over_least"] - 1, EXTRA_FLOPS)
    if "outside_forward" in ours.get("extra", {}):
        at_most("share of time outside model forwards", ours["extra"]["outside_forward"], OVERHEAD)
    plain = found.get("plain", {})
    for figure, wanted in PLAIN.items():
        if figure in plain.get("best_peer", {}):
            best = plain["best_peer"][figure]
            at_least(f"{figure} faster than {best['peer']} by", best["ours_is_faster_by"], wanted)
    if OURS in plain.get("bandwidth_fraction", {}):
        at_least("decode_1 of the read bandwidth", plain["bandwidth_fraction"][OURS], BANDWIDTH)
    return out
