"""Speed of training, as ratios within one run on one core.

    python -m bench.train RUN [STEPS]

RUN is a run folder with shards and embeddings, of regions or of pixels
(`halftone run --recipe flickr8k_regions …`); the recipe's own towers are trained with triplet +
S-NDCG for STEPS steps (default 40, of 128 pairs), with batches made by a thread of the process.

Regions: samples a second against the loop of the papers' public code written down again plainly, a
data set that is asked for one sample at a time and a loss of B×B×B. Pixels: the loader alone
against a bare loop that decodes each picture once.
"""

import io
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from bench.losses import public_ndcg
from pipeline.labels import embed
from pipeline.labels.caption_vectors import Captions
from pipeline.models.vocabulary import pad
from pipeline.training import train
from pipeline.training.data import Split
from pipeline.training.distributed import ProcessGroup
from pipeline.training.loading.waiting import Stopwatch, watched
from pipeline.training.trainer import TowerTrainer
from schemas.settings import Recipe

torch.set_num_threads(1)
LOSSES = {"triplet": {"weight": 0.2}, "smooth_ndcg": {"weight": 0.8, "tau": 0.01}}


def main(root: str, steps: int) -> None:
    training = training_of(root)
    if training.train_split.features is None:
        pixels(training, steps)
    else:
        regions(training, steps)


def training_of(root: str) -> TowerTrainer:
    """A training of the run's recipe that leaves nothing behind in its model's folder."""
    kept = sorted(Path(root).glob("settings-*.yaml"))[0]
    recipe = Recipe(**yaml.safe_load(kept.read_text()))
    changed = recipe.train.model_copy(update={"losses": LOSSES, "workers": 1, "log_every": 10})
    recipe = recipe.model_copy(update={"train": changed})
    piece = train.plan(recipe, root, "bench").pieces[0]
    training = TowerTrainer(piece, ProcessGroup())
    training.loader.workers = 0  # CPU time is that of this process
    return training


def ours(training: TowerTrainer, steps: int) -> tuple[float, float]:
    """CPU seconds of `steps` steps, and the share of the time spent waiting for data."""
    data, waited, wall, cpu = Stopwatch(training.world.device), 0.0, 0.0, 0.0
    for number, batch in enumerate(watched(training.batches(0), data)):
        if number == 5:  # warm
            waited, wall, cpu = data.seconds, time.perf_counter(), time.process_time()
        if number == steps + 5:
            break
        training.learner.step(batch, number)
    return time.process_time() - cpu, (data.seconds - waited) / (time.perf_counter() - wall)


def regions(training: TowerTrainer, steps: int) -> None:
    pairs = training.settings.batch_size * steps
    mine, waiting = ours(training, steps)
    theirs = restated(training, steps)
    print(f"ours      {pairs / mine:8.0f} samples/s of one core, waited for data {waiting:.1%}")
    print(f"restated  {pairs / theirs:8.0f} samples/s of one core")
    print(f"ratio     {theirs / mine:8.2f}")


def restated(training: TowerTrainer, steps: int) -> float:
    """CPU seconds of the public code's loop: per-sample data set, collate, B×B×B loss, Adam."""
    split, vocabulary = training.train_split, training.vocabulary
    files = embed.files(training.recipe, training.root).of_split("train")
    data = PerSample(split, vocabulary, Captions.read(files))
    loader = torch.utils.data.DataLoader(
        data, batch_size=training.settings.batch_size, shuffle=True, collate_fn=collate
    )
    model = training.learner.model
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-4)
    cpu = 0.0
    for number, (images, words, lengths, captions_C, caption) in enumerate(loader):
        if number == 2:
            cpu = time.process_time()
        if number == steps + 2:
            break
        image, text = model(images, words, lengths)
        scores = image @ text.T
        relevance = torch.einsum("icd,jd->ijc", captions_C, caption).amax(-1).clamp(0, 1)
        relevance.fill_diagonal_(1)
        loss = 0.2 * hardest(scores) + 0.8 * (
            public_ndcg(scores, relevance) + public_ndcg(scores.T, relevance.T)
        )
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()
    return time.process_time() - cpu


class PerSample(torch.utils.data.Dataset):
    """One pair at a time: features, word ids, and the embeddings of the image's captions."""

    def __init__(self, split: Split, vocabulary, captions):
        self.split, self.vocabulary, self.captions = split, vocabulary, captions
        self.features = np.stack([split.image(row) for row in range(len(split))])
        self.owner = np.repeat(np.arange(len(split)), split.caption_count)

    def __len__(self) -> int:
        return len(self.split.captions)

    def __getitem__(self, row: int):
        image = self.owner[row]
        first, count = self.captions.first[image], self.captions.count[image]
        return (
            torch.Tensor(self.features[image].astype(np.float32)),
            self.vocabulary.ids([self.split.captions[row]], 64)[0],
            self.captions.vectors[first : first + count],
            self.captions.vectors[row],
        )


def collate(samples):
    """The longest caption first, as the public code packs them."""
    samples.sort(key=lambda sample: len(sample[1]), reverse=True)
    images, ids, captions, caption = zip(*samples, strict=True)
    words, lengths = pad(list(ids))
    return torch.stack(images), words, lengths, torch.stack(captions), torch.stack(caption)


def hardest(scores: torch.Tensor) -> torch.Tensor:
    own = scores.diag()
    mask = torch.eye(len(scores), dtype=torch.bool)
    rows = (0.2 + scores - own[:, None]).clamp(min=0).masked_fill(mask, 0).amax(1)
    columns = (0.2 + scores - own[None, :]).clamp(min=0).masked_fill(mask, 0).amax(0)
    return (rows + columns).mean()


def pixels(training: TowerTrainer, steps: int) -> None:
    _, waiting = ours(training, steps)
    print(f"waited for data {waiting:.1%}")
    runs = [loader_alone(training.piece.inputs["root"], steps) for _ in range(5)]
    for shares, loop in zip(zip(*runs, strict=True), ("decodes", "reads and decodes"), strict=True):
        middle, low, high = statistics.median(shares), min(shares), max(shares)
        print(f"loader, one thread: {middle:.2f} ({low:.2f} to {high:.2f}) × a loop that {loop}")


def loader_alone(root: str, steps: int) -> tuple[float, float]:
    """CPU time of a bare loop over that of the loader: decoding alone, reading and decoding."""
    training = training_of(root)  # nothing is decoded yet
    started = time.process_time()
    for number, _ in enumerate(training.loader.epoch(0), 1):
        if number == steps:
            break
    loader = time.process_time() - started
    time.sleep(0.5)  # batches made ahead are more than were taken
    split, size = training.train_split, training.recipe.model.image_size
    made = np.flatnonzero(training.loader._held).tolist()
    started = time.process_time()
    payloads = [split.payload(row) for row in made]
    reading = time.process_time() - started
    started = time.process_time()
    for data in payloads:
        image = Image.open(io.BytesIO(data))
        image.draft("RGB", (size, size))
        np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    bare = time.process_time() - started
    return bare / loader, (bare + reading) / loader


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 40)
