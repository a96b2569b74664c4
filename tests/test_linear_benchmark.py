"""The benchmark of one layer: its counts against formulas, and its tables."""

import pytest
import torch

from benchmarks import linear
from benchmarks.linear_variants import AUTO, FULL, PEFT, Shape, counted, paths_on, variants
from benchmarks.outcome import document

SHAPE = Shape(outputs=48, inputs=40, tokens=64, rank=4, dtype="float32", microbatches=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found():
    made = variants(SHAPE, CPU, compiled=False)
    return {name: counted(update, SHAPE, peak=1e12, bandwidth=1e10) for name, update in made.updates.items()}


def test_flops_are_those_of_the_algebra(found):
    tokens, pairs, ends = SHAPE.tokens, SHAPE.outputs * SHAPE.inputs, SHAPE.rank * (SHAPE.outputs + SHAPE.inputs)
    separate = 4 * tokens * pairs + 6 * tokens * ends
    forming = 2 * SHAPE.rank * pairs / SHAPE.microbatches
    assert found[FULL].flops == 6 * tokens * pairs
    assert found["factored"].flops == found["addmm"].flops == found[PEFT].flops == separate
    assert found["merged"].flops == 4 * tokens * pairs + 4 * tokens * ends + forming


def test_fewer_operations_move_fewer_bytes_and_hold_less(found):
    assert found["addmm"].bytes < found["factored"].bytes < found[PEFT].bytes
    assert found["addmm"].peak_bytes <= found["factored"].peak_bytes
    for one in found.values():
        assert one.roofline_seconds >= max(one.flops / 1e12, one.bytes / 1e10) * (1 - 1e-9)


def test_an_operation_reads_its_arguments_and_writes_its_result():
    def update():
        torch.mm(torch.ones(4, 8).t(), torch.ones(4, 2))

    # 32 and 8 ones written; the turned view costs nothing; both read and 16 values written.
    assert counted(update, Shape(**{**SHAPE_FIELDS, "microbatches": 1}), peak=1e12, bandwidth=1.0).bytes == 4 * (
        40 + 56
    )


SHAPE_FIELDS = {"outputs": 8, "inputs": 4, "tokens": 2, "rank": 1, "dtype": "float32"}


def test_rows_have_all_variants_and_the_table_says_what_was_not_seen():
    rows = linear.compare(SHAPE, CPU, repetitions=2, compiled=False)
    paths = [path.value for path in paths_on(CPU)]
    assert [row["variant"] for row in rows] == [FULL, *paths, AUTO, PEFT]
    assert [row["takes"] in paths for row in rows] == [row["variant"] == AUTO for row in rows]
    assert rows[0]["to_full"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    rows.append({**rows[-1], "variant": linear.COMPILED, "flops": None, "bytes": None, "peak_bytes": None})
    text = linear.tables(document("linear", CPU, settings={}, rows=rows))
    assert "48 x 40, 64 tokens x 2, rank 4, float32" in text
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {linear.COMPILED}"))
    assert line.count("not seen") == 3
