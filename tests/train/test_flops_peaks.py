import pytest
import torch

from vlm.train.metrics import PEAKS, device_peak, find_peak, measure_peak


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-16GB", 15.7),
        ("Tesla V100-PCIE-32GB", 14),
        ("Tesla T4", 8.1),
    ],
)
def test_torch_s_name_finds_the_data_sheet(name, tflops):
    assert find_peak(name, "bf16") == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA A1000", "NVIDIA L400", "NVIDIA GeForce RTX 4090 Laptop GPU"])
def test_a_name_that_only_begins_alike_is_not_taken_for_another(name):
    assert find_peak(name, "bf16") == 0.0


def test_what_is_given_wins_and_says_so():
    peak = device_peak(torch.device("cpu"), "fp32", override_tflops=2.5)
    assert peak.flops == 2.5e12
    assert "given" in peak.source


def test_a_gpu_is_looked_up_and_counts_in_tf32_where_that_is_allowed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    peak = device_peak(torch.device("cuda"), "fp32")
    assert peak.flops == 494e12
    assert "NVIDIA H200" in peak.source
    assert "tf32" in peak.source
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "highest")
    assert device_peak(torch.device("cuda"), "fp32").flops == 67e12
    assert device_peak(torch.device("cuda"), "bf16").flops == 989e12


def test_a_cpu_is_measured_and_says_so():
    peak = measure_peak(torch.device("cpu"), "fp32", side=64, seconds=0.0)
    assert peak.flops > 0
    assert "measured here: fp32" in peak.source


def test_bf16_is_never_slower_than_tf32_nor_tf32_than_fp32():
    for name, peak in PEAKS.items():
        assert peak["bf16"] >= peak["tf32"] >= peak["fp32"], name
