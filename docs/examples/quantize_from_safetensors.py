#!/usr/bin/env python
"""Quantize a safetensors model and print what was measured.

    python quantize_from_safetensors.py --input model.safetensors --output model-int2/ --bit-width 2 --profile edge

A file, an index or a model directory in; a directory out, or one file where it ends in .parquet or .arrow.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from arrowquant_gpu import ArrowQuantV2, ShardedSafeTensorsLoader
from arrowquant_gpu.errors import ArrowQuantError

PERCENT = 10  # a line for so many more


def show_progress() -> Any:
    """A callback that prints a line at every tenth."""
    shown = -1

    def progress(name: str, fraction: float) -> None:
        nonlocal shown
        step = int(100 * fraction) // PERCENT
        if step > shown:
            shown = step
            print(f"  {step * PERCENT:3d} %  {name}", flush=True)

    return progress


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="a safetensors file, its index, or a model directory")
    parser.add_argument("--output", required=True, help="a directory, or a file that ends in .parquet or .arrow")
    parser.add_argument("--bit-width", type=int, help="2, 3, 4, 5, 6 or 8; by default that of the profile, else 4")
    parser.add_argument("--profile", choices=("edge", "local", "cloud"), help="width, group size and least accuracy")
    parser.add_argument("--modality", help="text, code, image or audio; by default what the model says of itself")
    parser.add_argument("--calibration", help="activations as JSON lines, Parquet or Arrow")
    parser.add_argument("--fail-fast", action="store_true", help="an error where a tensor would need more bits")
    parser.add_argument("--validate", action="store_true", help="read the output back and compare it with the input")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier run left at the output")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    given = parser.parse_args()
    options: dict[str, Any] = {"modality": given.modality, "calibration": given.calibration}
    if given.bit_width is not None:
        options["bit_width"] = given.bit_width
    try:
        print(ShardedSafeTensorsLoader(given.input).summary())
        quantizer = ArrowQuantV2(mode="diffusion", device=given.device)
        result = quantizer.quantize_from_safetensors(
            given.input,
            given.output,
            profile=given.profile,
            fail_fast=given.fail_fast,
            overwrite=given.overwrite,
            progress_callback=show_progress(),
            **options,
        )
        for warning in result.warnings:
            print(f"note: {warning}")
        for key, value in result.items():
            print(f"{key}: {value:.4f}" if isinstance(value, float) else f"{key}: {value}")
        if given.validate:
            quality = quantizer.validate_quality(given.input, given.output)
            print(f"validated: {'passed' if quality['passed'] else 'failed'}")
            worst = min(quality["per_layer_accuracy"].items(), key=lambda item: item[1])
            print(f"worst tensor: {worst[0]} {worst[1]:.4f}")
            for name, problem in quality.problems.items():
                print(f"{name}: {problem}", file=sys.stderr)
            return 0 if quality["passed"] else 8
    except ArrowQuantError as e:
        print(f"quantize_from_safetensors: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
