"""How long a device had nothing to do, and what a record of it means."""

from types import SimpleNamespace

import pytest
import torch

from jobs.cli import show
from pipeline.training.loading import waiting
from pipeline.training.loading.limits import limit_of
from pipeline.training.loading.waiting import Stopwatch, figures, watched


def test_waiting_is_the_time_between_steps_and_not_the_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(waiting, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def batches():
        for number in range(3):
            now[0] += 2
            yield number

    data = Stopwatch(torch.device("cpu"))
    for _ in watched(batches(), data):
        now[0] += 10
    assert data.seconds == 6


def test_a_record_tells_of_all_workers_and_of_the_one_that_waits_most():
    shares = torch.tensor([[0.0, 0.2, 0.1, 0.6], [0.4, 0.9, 0.8, 0.0]])
    found = figures(shares)
    assert found == {
        "train/data_wait": pytest.approx(0.2),
        "train/data_wait_worst": pytest.approx(0.4),
        "train/decode_busy": pytest.approx(0.9),
        "train/storage_busy": pytest.approx(0.8),
        "train/exchange_wait": pytest.approx(0.3),
    }
    assert limit_of(found) == "storage"
    assert limit_of({**found, "train/storage_busy": 0.3}) == "decode"
    quick = {**found, "train/data_wait": 0.0, "train/data_wait_worst": 0.01}
    assert limit_of(quick) == "exchange"
    assert limit_of({**quick, "train/exchange_wait": 0.1}) == "device"
    assert limit_of({"train/data_wait": 0.3}) == "data"  # of a training before there were others


def test_the_line_of_an_epoch_says_what_limits():
    record = {"epoch": 2, "train/samples_per_second": 3812.0, "train/data_wait": 0.21}
    record |= {"train/data_wait_worst": 0.4, "train/decode_busy": 0.9, "train/storage_busy": 0.1}
    line = show._epoch(record, 8)
    assert line.startswith("2/8  3,812 samples/s  waited for data 21 % (one worker 40 %)")
    assert line.endswith("limited by decode")
    learned = {"train/info_nce_temperature": 0.04271, "train/siglip_bias": -9.5}
    assert "temperature 0.04271  bias -9.5  " in show._epoch({**record, **learned}, 8)
