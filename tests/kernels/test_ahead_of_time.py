import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "ahead.py"
ARCHITECTURES = (80, 90)
# what one block of threads may have
SHARED = {80: 163 * 1024, 90: 227 * 1024}
# at cmd-sd21's sizes: everything that these move, they move 16 bytes at a time
STREAMS = {
    "_content_frame_fwd_kernel",
    "_content_frame_bwd_kernel",
    "_motion_tokens_kernel",
    "_group_norm_silu_apply_kernel",
    "_group_norm_silu_bwd_apply_kernel",
    "_layer_norm_fwd_kernel",
    "_geglu_fwd_kernel",
    "_wide_attention_softmax_kernel",
    "_time_attention_fwd_kernel",
    "_rotate_fwd_kernel",
}
# and these have nothing to move that much of: sums and latents, thousandths of the whole, or pixels,
# whose three channels no 16 bytes divide
NARROW = {
    "_motion_combine_kernel",
    "_group_norm_silu_combine_kernel",
    "_group_norm_silu_bwd_combine_kernel",
    "_summary_combine_kernel",
    "_yuv420p_fwd_kernel",
}
# these read a lot and write sums
SUMS = {"_moments_kernel", "_group_norm_silu_bwd_partial_kernel", "_motion_sums_kernel"}
CONVOLUTION = "1x128x512x1024"
PRODUCTS = {
    "_summary_fwd_kernel",
    "_readout_fwd_kernel",
    "_readout_bwd_kernel",
    "_summary_bwd_kernel",
    "_tokens_bwd_kernel",
}
# too small for the instructions of four warps
SMALL_PRODUCTS = {"_time_attention_fwd_kernel"}


@pytest.fixture(scope="module")
def built():
    """What `ahead.py` says of every kernel, for both architectures at once."""

    def ask(architecture):
        command = [sys.executable, SCRIPT, "--json", "--architecture", str(architecture)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(ask, ARCHITECTURES))
    return {"kernels": answers[0]["kernels"], "compiled": [row for answer in answers for row in answer["compiled"]]}


def failing(rows, wrong):
    """The compiled kernels of which something is wrong, in words."""
    return [f"{row['kernel']} sm_{row['architecture']}: {row}" for row in rows if wrong(row)]


def test_every_kernel_compiles_for_every_architecture_and_dtype(built):
    assert len(built["kernels"]) >= 6
    for architecture in ARCHITECTURES:
        for dtype in ("float16", "bfloat16"):
            rows = [
                row["kernel"]
                for row in built["compiled"]
                if (row["architecture"], row["dtype"]) == (architecture, dtype)
            ]
            assert set(built["kernels"]) == set(rows), (architecture, dtype)


def test_no_register_is_spilled(built):
    assert not failing(built["compiled"], lambda row: row["spills"] or row["stack"])


def test_shared_memory_is_within_the_limit(built):
    assert not failing(built["compiled"], lambda row: row["shared"] > SHARED[row["architecture"]])


def test_memory_is_moved_sixteen_bytes_at_a_time(built):
    rows = [row for row in built["compiled"] if "x" in row["case"]]
    streams = [row for row in rows if row["kernel"] in STREAMS]
    assert not failing(streams, lambda row: row["wide_loads"] < row["loads"] or row["wide_stores"] < row["stores"])
    others = [row for row in rows if row["kernel"] not in NARROW]
    assert not failing(others, lambda row: not row["wide_loads"])
    assert not failing(others, lambda row: not row["wide_stores"] and row["kernel"] not in SUMS)
    # what follows a convolution writes the map too
    sums = [row for row in rows if row["kernel"] == "_moments_kernel" and row["case"] == CONVOLUTION]
    assert sums and not failing(sums, lambda row: not row["wide_stores"])


def test_products_run_on_tensor_cores(built):
    rows = [row for row in built["compiled"] if row["kernel"] in PRODUCTS | SMALL_PRODUCTS]
    assert {row["kernel"] for row in rows} == PRODUCTS | SMALL_PRODUCTS
    assert not failing(
        [row for row in rows if "x" in row["case"]],
        lambda row: not row["mma" if row["architecture"] == 80 or row["kernel"] in SMALL_PRODUCTS else "wgmma"],
    )
