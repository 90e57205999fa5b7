"""FLOPs of attention against 4 B H N M D, by every kernel that this machine and PyTorch's version have."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dpcache.flops import FlopCounter, _warn_uncounted

# name -> B, H, H of the keys, N, M, D, width of the values, mask
SHAPES = {
    "self-attention": (2, 4, 4, 8, 8, 16, 16, False),
    "masked": (2, 4, 4, 8, 8, 16, 16, True),
    "cross-attention": (2, 4, 4, 8, 24, 16, 16, False),
    "masked cross-attention": (2, 4, 4, 8, 24, 16, 16, True),
    "grouped queries": (2, 4, 2, 8, 24, 16, 16, False),
    "other value width": (2, 4, 4, 8, 24, 16, 32, False),
}
ALL = [backend for name, backend in SDPBackend.__members__.items() if name != "ERROR"]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def tensors(name, device="cpu"):
    """Query, keys, values, mask, and FLOPs by the textbook: N x M scores of D, then N sums of M values, per head."""
    batch, heads, shared, queries, keys, width, values, masked = SHAPES[name]
    query = torch.randn(batch, heads, queries, width, device=device)
    key = torch.randn(batch, shared, keys, width, device=device)
    value = torch.randn(batch, shared, keys, values, device=device)
    mask = torch.zeros(queries, keys, device=device) if masked else None
    scores = 2 * batch * heads * queries * keys * width
    return query, key, value, mask, scores + 2 * batch * heads * queries * keys * values


def test_the_expected_count_is_the_formula_of_the_papers():
    assert tensors("cross-attention")[-1] == 4 * 2 * 4 * 8 * 24 * 16


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("backend", [None, *ALL])
@pytest.mark.filterwarnings("ignore")  # PyTorch's list of reasons against a kernel
def test_attention_counts_the_same_by_every_kernel(backend, name, device):
    query, key, value, mask, expected = tensors(name, device)
    counted = []
    for dtype in (torch.float32, torch.bfloat16):  # flash attention on CUDA takes only the second
        call = {"attn_mask": mask if mask is None else mask.to(dtype), "enable_gqa": name == "grouped queries"}
        try:
            with torch.no_grad(), sdpa_kernel(backend or ALL), FlopCounter() as counter:
                F.scaled_dot_product_attention(query.to(dtype), key.to(dtype), value.to(dtype), **call)
        except RuntimeError as error:
            if "No viable backend" not in str(error) and "No available kernel" not in str(error):
                raise
            continue
        counted.append(counter.get_total_flops())
    if backend not in (None, SDPBackend.MATH) and not counted:
        pytest.skip("not a kernel for this device and these shapes")
    assert counted and set(counted) == {expected}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    "kernel, fixed",
    [
        ("_scaled_dot_product_flash_attention", ()),
        ("_scaled_dot_product_flash_attention_for_cpu", ()),
        ("_scaled_dot_product_efficient_attention", (None, False)),
        ("_scaled_dot_product_cudnn_attention", (None, False)),
        ("_scaled_dot_product_fused_attention_overrideable", ()),
        ("_scaled_dot_product_attention_math_for_mps", ()),
    ],
)
def test_kernels_of_other_devices_count_the_same(kernel, fixed, name):
    """The operation as the counter sees it, without running it: only its shapes matter."""
    packet = getattr(torch.ops.aten, kernel)
    query, key, value, _, expected = tensors(name, "meta")
    counter = FlopCounter()
    counter._count_flops(packet, query, (query, key, value, *fixed), {"scale": 0.1})
    assert counter.get_total_flops() == expected


def test_an_attention_kernel_without_a_formula_is_warned_of_once(caplog):
    _warn_uncounted.cache_clear()
    with torch.library._scoped_library("dpcache_test", "FRAGMENT") as library, caplog.at_level(logging.WARNING):
        library.define("fancy_attention(Tensor query) -> Tensor")
        library.impl("fancy_attention", torch.clone, "CPU")
        with FlopCounter() as counter:
            for _ in range(2):
                torch.ops.dpcache_test.fancy_attention(torch.zeros(2))
    assert counter.get_total_flops() == 0
    assert [record.getMessage() for record in caplog.records] == [
        "FLOPs leave out dpcache_test.fancy_attention: there is no formula for this kernel of attention"
    ]
