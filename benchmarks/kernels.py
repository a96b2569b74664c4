"""What the Triton kernels take of a GPU, found by compiling them ahead of time: no GPU is needed.

Registers and spills of a thread, shared memory of a block, and whether the tensor cores' instructions are there, for
layers whose sizes are multiples of 16. It says that they build and what limits their occupancy, not how fast they are.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.outcome import Document, document, markdown, write_document
from launch import exits
from relora.errors import ConfigError
from relora.kernels.setting import ONE_PASS_RANK, has_triton

_SIZE = "i32, a multiple of 16"
_FACTORS = {"bf16": ("*bf16", False), "fp32": ("*fp32", True)}


def builds() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Each kernel as the layers call it: name, function, types of its arguments, constants."""
    from relora.kernels import factor_gradients, grouped, merge, products

    found = []
    for dtype, (pointer, widen) in _FACTORS.items():
        for precision in ("split", "stochastic", "nearest") if dtype == "bf16" else ("float32",):
            words = _types("weight result left right", pointer) | _types("bits result_bits", "*i16")
            words |= {"key": "i64", "scaling": "fp32"} | _types("rows columns rank", _SIZE)
            tile = {"BLOCK_ROWS": merge.ROWS, "BLOCK_COLUMNS": merge.COLUMNS, "BLOCK_DEPTH": merge.DEPTH}
            constants = {"PRECISION": precision, "HAS_BITS": precision == "split", "WIDEN": widen, **tile}
            found.append((f"merge, {precision}", merge.merge_kernel, words, constants))
        rows, columns, depth = products.tile(widen)
        tile = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "BLOCK_DEPTH": depth, "GROUP": products.GROUP}
        words = _types("a b p q bias c", pointer) | {"scaling": "fp32"} | _types("rows columns depth rank", _SIZE)
        words |= _types("a_head a_row a_depth b_depth b_column p_head p_row p_depth q_head q_depth q_column", _SIZE)
        for way, ones in (
            ("forward", "a_depth b_depth p_depth q_depth"),
            ("backward", "a_depth b_column p_depth q_column"),
        ):
            constants = {"HAS_BIAS": way == "forward", "WIDEN": widen, **tile, "BLOCK_RANK": 16}
            constants |= dict.fromkeys(ones.split(), 1)  # the launcher makes constants of steps of 1
            found.append((f"two products, {dtype}, {way}", products.products_kernel, words, constants))
        words = _types("outer up small inner", pointer) | {"slices": "*fp32"}
        words |= _types("rows columns rank strip", _SIZE)
        tile = {"BLOCK_ROWS": factor_gradients.height(widen), "BLOCK_COLUMNS": factor_gradients.COLUMNS}
        constants = {"WIDEN": widen, **tile, "BLOCK_RANK": ONE_PASS_RANK}
        found.append((f"factor gradients, {dtype}", factor_gradients.factor_gradients_kernel, words, constants))
        tile = {"BLOCK_ROWS": grouped.ROWS, "BLOCK_COLUMNS": grouped.COLUMNS, "BLOCK_DEPTH": grouped.DEPTH}
        places = _types("order starts block_heads block_starts", "*i64")
        words = _types("a b c", pointer) | places | {"scaling": "fp32"}
        words |= _types("columns depth b_head b_depth b_column", _SIZE)
        found.append((f"grouped rows, {dtype}", grouped.grouped_rows_kernel, words, {"WIDEN": widen, **tile}))
        tile = {"BLOCK_ROWS": grouped.ROWS, "BLOCK_HEIGHT": grouped.COLUMNS, "BLOCK_WIDTH": grouped.COLUMNS}
        words = _types("a b c", pointer) | _types("order starts", "*i64") | {"scaling": "fp32"}
        words |= _types("height width", _SIZE)
        found.append((f"grouped outer, {dtype}", grouped.grouped_outer_kernel, words, {"WIDEN": widen, **tile}))
    return found


def _types(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def resources(kernel: Any, words: dict[str, str], constants: dict[str, Any], architecture: int) -> dict[str, Any]:
    """Compile one kernel for NVIDIA's `sm_<architecture>`; returns what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from relora.kernels import factor_gradients, products

    order = [name for name in kernel.arg_names if name not in constants]
    signature = {name: words[name].split(",")[0] for name in order} | dict.fromkeys(constants, "constexpr")
    # As the launcher would know it: all pointers come from torch, which aligns them, and a layer's sizes are even.
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if name not in constants and (words[name].startswith("*") or words[name] == _SIZE)
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    chosen = {
        products.products_kernel: products.WARPS,
        factor_gradients.factor_gradients_kernel: factor_gradients.WARPS,
    }
    options = {"num_warps": chosen.get(kernel, 4)}  # 4 is Triton's own choice
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    usage = _usage(built.asm["cubin"])
    return {
        "registers": usage["REG"],
        "spilled_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": built.metadata.shared,
        "warps": built.metadata.num_warps,
        "tensor_cores": bool(re.search(r"wgmma|mma\.sync", built.asm["ptx"])),
    }


def _usage(cubin: bytes) -> dict[str, int]:
    """What NVIDIA's own tool, which comes with Triton, says of a compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True)
    return {word: int(count) for word, count in re.findall(r"([A-Z]+):(\d+)", told.stdout + told.stderr)}


def results(architecture: int) -> Document:
    """The document: a row for each kernel."""
    rows = [
        {"kernel": name, **resources(kernel, words, constants, architecture)}
        for name, kernel, words, constants in builds()
    ]
    return document("kernels", torch.device("cpu"), settings={"architecture": architecture}, rows=rows)


def tables(study: Document) -> str:
    """The study as Markdown."""
    lines = [
        [
            row["kernel"],
            str(row["registers"]),
            str(row["spilled_bytes"]),
            str(row["shared_bytes"]),
            str(row["warps"]),
            "yes" if row["tensor_cores"] else "no",
        ]
        for row in study["rows"]
    ]
    return markdown(["kernel", "registers", "spilled B", "shared B", "warps", "tensor cores"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--architecture", type=int, default=90, help="compute capability times ten (default 90)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    options = parser.parse_args(argv)
    return exits.run(lambda: _command(options))


def _command(options: argparse.Namespace) -> int:
    if not has_triton():
        raise ConfigError("benchmarks.kernels needs Triton: pip install 'accrete[triton]'")
    outcome = results(options.architecture)
    print(tables(outcome))
    if options.json:
        write_document(options.json, outcome)
    return exits.DONE


if __name__ == "__main__":
    sys.exit(main())
