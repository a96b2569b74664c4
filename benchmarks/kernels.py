"""What the Triton kernels take of a GPU, found by compiling them ahead of time: no GPU is needed.

Registers and spills of a thread, shared memory of a block, and whether the tensor cores' instructions are there. It
says that they build and what limits their occupancy, not how fast they are.
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
from relora.kernels.setting import has_triton

_FACTORS = {"bf16": ("*bf16", False), "fp32": ("*fp32", True)}


def builds() -> list[tuple[str, Any, dict[str, str], dict[str, Any]]]:
    """Each kernel as the layers call it: name, function, types of its arguments, constants."""
    from relora.kernels import factor_gradients, grouped, merge, products

    found = []
    for dtype, (pointer, widen) in _FACTORS.items():
        for precision in ("split", "stochastic", "nearest") if dtype == "bf16" else ("float32",):
            words = _types("weight result left right", pointer) | _types("bits result_bits", "*i16")
            words |= {"key": "i64", "scaling": "fp32"} | _types("rows columns rank", "i32")
            tile = {"BLOCK_ROWS": merge.ROWS, "BLOCK_COLUMNS": merge.COLUMNS, "BLOCK_DEPTH": merge.DEPTH}
            constants = {"PRECISION": precision, "HAS_BITS": precision == "split", "WIDEN": widen, **tile}
            found.append((f"merge, {precision}", merge.merge_kernel, words, constants))
        tile = {"BLOCK_ROWS": products.ROWS, "BLOCK_COLUMNS": products.COLUMNS, "BLOCK_DEPTH": products.DEPTH}
        words = _types("a b p q c", pointer) | {"scaling": "fp32"} | _types("rows columns depth rank", "i32")
        words |= _types("a_row a_depth b_depth b_column p_row p_depth q_depth q_column", "i32")
        constants = {"WIDEN": widen, **tile, "BLOCK_RANK": 16}
        found.append((f"two products, {dtype}", products.products_kernel, words, constants))
        words = _types("outer up small inner", pointer) | {"slices": "*fp32", "scaling": "fp32"}
        words |= _types("rows columns rank strip", "i32")
        kernel = factor_gradients.factor_gradients_kernel
        for rank in (32, 128):
            rows, columns = factor_gradients.tile(rank, widen)
            constants = {"WIDEN": widen, "BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "BLOCK_RANK": rank}
            found.append((f"factor gradients, {dtype}, rank {rank}", kernel, words, constants))
        tile = {"BLOCK_ROWS": grouped.ROWS, "BLOCK_COLUMNS": grouped.COLUMNS, "BLOCK_DEPTH": grouped.DEPTH}
        places = _types("order starts block_heads block_starts", "*i64")
        words = _types("a b c", pointer) | places | {"scaling": "fp32"}
        words |= _types("columns depth b_head b_depth b_column", "i32")
        found.append((f"grouped rows, {dtype}", grouped.grouped_rows_kernel, words, {"WIDEN": widen, **tile}))
        tile = {"BLOCK_ROWS": grouped.ROWS, "BLOCK_HEIGHT": grouped.COLUMNS, "BLOCK_WIDTH": grouped.COLUMNS}
        words = _types("a b c", pointer) | _types("order starts", "*i64") | {"scaling": "fp32"}
        words |= _types("height width", "i32")
        found.append((f"grouped outer, {dtype}", grouped.grouped_outer_kernel, words, {"WIDEN": widen, **tile}))
    return found


def _types(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def resources(kernel: Any, words: dict[str, str], constants: dict[str, Any], architecture: int) -> dict[str, Any]:
    """Compile one kernel for NVIDIA's `sm_<architecture>`; returns what it takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from relora.kernels.factor_gradients import WARPS

    order = [name for name in kernel.arg_names if name not in constants]
    signature = {name: words[name] for name in order} | dict.fromkeys(constants, "constexpr")
    # As the launcher would know it: all pointers come from torch, which aligns them.
    aligned = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if words.get(name, "").startswith("*")
    }
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    warps = WARPS if kernel.__name__ == "factor_gradients_kernel" else 4  # Triton's own choice
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps})
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
