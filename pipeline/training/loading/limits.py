"""What limits a training, by an epoch's record of waiting."""

WAITS = 0.05  # share of an epoch from which on waiting for data is what limits it
EXCHANGE = 0.2  # and for other workers: some of that is the way of the vectors themselves


def limit_of(record: dict[str, float]) -> str:
    """What limits: "device", "exchange", "decode" or "storage"; "data" of a record made before.

    >>> limit_of({"train/data_wait": 0.01, "train/data_wait_worst": 0.02})
    'device'
    >>> busy = {"train/decode_busy": 0.9, "train/storage_busy": 0.5}
    >>> limit_of({"train/data_wait_worst": 0.4, **busy})
    'storage'
    """
    if record.get("train/data_wait_worst", record.get("train/data_wait", 0.0)) < WAITS:
        return "exchange" if record.get("train/exchange_wait", 0.0) > EXCHANGE else "device"
    if "train/decode_busy" not in record:
        return "data"
    busy, storage = record["train/decode_busy"], record["train/storage_busy"]
    return "storage" if storage > busy / 2 else "decode"
