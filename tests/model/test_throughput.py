import pytest

from model.throughput import Throughput, peak_flops


def test_rates_are_counts_over_time_and_start_anew_after_a_report(monkeypatch):
    now = iter([0.0, 0.5, 1.5, 4.0, 10.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr("model.throughput.time.perf_counter", lambda: next(now))
    speed = Throughput(world_size=2, device="cpu", flops_per_sample=(3e12, 2e12), peak=4e12)
    with speed.step(), speed.waiting():
        pass
    speed.count(samples=8, tokens=800, neighbor_tokens=3200)
    report = speed.report()
    assert report["tokens_per_s"] == 200
    assert report["neighbor_tokens_per_s"] == 800
    assert report["data_wait"] == 0.25
    assert report["tflops_per_device"] == pytest.approx(3.0)
    assert report["mfu"] == pytest.approx(0.75)
    with speed.step(), speed.waiting():
        pass
    speed.count(samples=2, tokens=200, neighbor_tokens=0)
    report = speed.report()
    assert report["tokens_per_s"] == 100
    assert report["tflops_per_device"] == pytest.approx(1.0)
    assert speed.seconds == 6


def test_utilisation_is_unknown_where_the_peak_or_the_operations_are():
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 80GB HBM3", "bf16") == 989e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") == 756e12
    assert peak_flops("NVIDIA H200", "32") is None
    assert peak_flops("cpu", "bf16") is None
    for flops, peak in ((None, 1e12), ((1e12, 1e12), None)):
        speed = Throughput(1, "cpu", flops, peak)
        with speed.step():
            pass
        speed.count(1, 1, 1)
        report = speed.report()
        assert report["mfu"] is None
        assert (report["tflops_per_device"] is None) == (flops is None)
