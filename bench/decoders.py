"""Decoders of pictures: pictures a CPU second, and by how much their pixels differ from Pillow's.

    python -m bench.decoders

A JPEG becomes (3, 224, 224) uint8 in a batch's memory. Crops of scikit-learn's two photographs, at
quality 90, of four sizes. Compared are those of simplejpeg and OpenCV that are installed
(`pip install simplejpeg opencv-python-headless`); one thread, ways in turn, medians of five rounds.
"""

import io
import statistics
import time
from collections.abc import Callable

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.models.preprocessing import Preprocessing
from pipeline.sharding.decoding import decode, put

SIZE, PICTURES, ROUNDS = 224, 60, 5
SIZES = ((224, 224), (256, 256), (500, 375), (640, 480))
OUT = np.empty((3, SIZE, SIZE), np.uint8)


def main() -> None:
    ways = {name: way for name, way in WAYS.items() if way is not None}
    for width, height in SIZES:
        files = crops(width, height)
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                started = time.process_time()
                for data in files:
                    way(data)
                rates[name].append(PICTURES / (time.process_time() - started))
        print(f"{width} × {height}, {sum(map(len, files)) / PICTURES:,.0f} bytes")
        for name, way in ways.items():
            off = [
                np.abs(way(d).astype(int) - decode(d, Preprocessing.squash(SIZE))) for d in files
            ]
            mean, most = float(np.mean(off)), int(np.max(off))
            print(f"  {name:<28}{statistics.median(rates[name]):>8,.0f}/s{mean:>9.2f}{most:>5}")


def crops(width: int, height: int) -> list[bytes]:
    photographs = [Image.fromarray(image) for image in load_sample_images().images]
    rng, files = np.random.default_rng(0), []
    for number in range(PICTURES):
        whole = photographs[number % 2]
        tall = rng.uniform(0.5, 0.9) * min(whole.height, whole.width * height / width)
        wide = tall * width / height
        left, top = rng.uniform(0, whole.width - wide), rng.uniform(0, whole.height - tall)
        cut = whole.resize((width, height), Image.Resampling.LANCZOS, (left, top, left + wide,
                                                                      top + tall))  # fmt: skip
        file = io.BytesIO()
        cut.save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def by_pillow(data: bytes) -> np.ndarray:
    put(decode(data, Preprocessing.squash(SIZE)), OUT)
    return OUT.copy()


def by_pillow_at_once(data: bytes) -> np.ndarray:
    """As a whole picture is copied, not channel by channel."""
    OUT[:] = decode(data, Preprocessing.squash(SIZE))
    return OUT.copy()


def with_simplejpeg(resize: Callable[[np.ndarray], np.ndarray]) -> Callable | None:
    try:
        import simplejpeg
    except ImportError:
        return None

    def way(data: bytes) -> np.ndarray:
        image = simplejpeg.decode_jpeg(data, "RGB", min_height=SIZE, min_width=SIZE)
        put(resize(image).transpose(2, 0, 1), OUT)
        return OUT.copy()

    return way


def with_opencv(interpolation: str) -> Callable | None:
    try:
        import cv2
    except ImportError:
        return None
    cv2.setNumThreads(1)
    how = getattr(cv2, interpolation)

    def way(data: bytes) -> np.ndarray:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        put(cv2.resize(image, (SIZE, SIZE), interpolation=how).transpose(2, 0, 1), OUT)
        return OUT.copy()

    return way


def resized_by_pillow(image: np.ndarray) -> np.ndarray:
    resized = Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    return np.asarray(resized)


WAYS: dict[str, Callable | None] = {
    "Pillow": by_pillow,
    "Pillow, copied at once": by_pillow_at_once,
    "simplejpeg, Pillow's resize": with_simplejpeg(resized_by_pillow),
    "OpenCV, linear": with_opencv("INTER_LINEAR"),
    "OpenCV, area": with_opencv("INTER_AREA"),
}

if __name__ == "__main__":
    main()
