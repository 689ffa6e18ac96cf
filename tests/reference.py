"""Every formula again, as slow loops over one query's list in plain Python.

What the fast ones are tested against. `scores` and `target` are lists of numbers of one length,
only of candidates in the list. Nothing here is vectorised or shared with the code under test.
"""

import itertools
import math


def hinge(x):
    return max(0.0, x)


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def logsumexp(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def softmax(values):
    total = logsumexp(values)
    return [math.exp(v - total) for v in values]


def smooth_rank(scores, tau):
    return [
        1 + sum(sigmoid((s - x) / tau) for k, s in enumerate(scores) if k != j)
        for j, x in enumerate(scores)
    ]


def dcg(relevance, ranks):
    return sum((2**r - 1) / math.log2(1 + rank) for r, rank in zip(relevance, ranks, strict=True))


def smooth_ndcg(scores, relevance, tau=0.01):
    best = dcg(sorted(relevance, reverse=True), range(1, len(relevance) + 1))
    return 0.0 if best == 0 else 1 - dcg(relevance, smooth_rank(scores, tau)) / best


def ordered_pairs(relevance, gap):
    places = range(len(relevance))
    return [(j, k) for j in places for k in places if relevance[j] > relevance[k] + gap]


def kendall_rank(scores, relevance, gap=0.3, margin=0.0):
    hinges = [hinge(margin + scores[k] - scores[j]) for j, k in ordered_pairs(relevance, gap)]
    return sum(hinges) / len(hinges) if hinges else 0.0


def kendall_window(scores, relevance, window, hardest=None, gap=0.0, margin=0.0):
    order = sorted(range(len(scores)), key=lambda j: -relevance[j])
    pairs = [(order[i], order[i + window]) for i in range(len(order) - window)]
    wrong = [scores[k] - scores[j] for j, k in pairs if relevance[j] > relevance[k] + gap]
    wrong = sorted(wrong, reverse=True)[:hardest]
    return sum(hinge(margin + w) for w in wrong) / len(wrong) if wrong else 0.0


def kendall_smooth(scores, relevance, tau=0.01):
    ab = aa = bb = 0.0
    for j, k in itertools.permutations(range(len(scores)), 2):
        a = (relevance[j] > relevance[k]) - (relevance[j] < relevance[k])
        b = 2 * sigmoid((scores[j] - scores[k]) / tau) - 1
        ab, aa, bb = ab + a * b, aa + a * a, bb + b * b
    return 1 - ab / math.sqrt(aa * bb) if aa * bb > 0 else 0.0


def list_net(scores, relevance, temperature=0.05, target_temperature=0.1):
    target = softmax([r / target_temperature for r in relevance])
    found = [s / temperature - logsumexp([x / temperature for x in scores]) for s in scores]
    return -sum(t * f for t, f in zip(target, found, strict=True))


def soft_label_kl(scores, relevance, temperature=0.05, target_temperature=0.1):
    target = softmax([r / target_temperature for r in relevance])
    entropy = -sum(t * math.log(t) for t in target if t > 0)
    return list_net(scores, relevance, temperature, target_temperature) - entropy


def list_mle(scores, relevance, temperature=0.05):
    total = 0.0
    for s, r in zip(scores, relevance, strict=True):
        rivals = [x / temperature for x, y in zip(scores, relevance, strict=True) if y <= r]
        total += logsumexp(rivals) - s / temperature
    return total


def triplet(scores, positive, margin=0.2, negatives="hardest", tau=0.05, mining=1.0):
    good = [s for s, p in zip(scores, positive, strict=True) if p]
    bad = [s for s, p in zip(scores, positive, strict=True) if not p]
    if not good or not bad:
        return 0.0
    top = max(bad) if negatives == "hardest" else tau * logsumexp([s / tau for s in bad])
    every = [sum(hinge(margin + n - p) for n in bad) / len(bad) for p in good]
    mined = [hinge(margin + top - p) for p in good]
    if negatives == "all":
        mining = 0.0
    return sum((1 - mining) * e + mining * m for e, m in zip(every, mined, strict=True)) / len(good)


def info_nce(scores, positive, temperature=0.05, positives="any"):
    good = [s / temperature for s, p in zip(scores, positive, strict=True) if p]
    bad = [s / temperature for s, p in zip(scores, positive, strict=True) if not p]
    if not good:
        return 0.0
    if positives == "any":
        return logsumexp(good + bad) - logsumexp(good)
    return sum(logsumexp([g, *bad]) - g for g in good) / len(good)


def masked_info_nce(scores, relevance, temperature=0.05, ignore_above=0.5, positive_at=1.0):
    kept = [j for j, r in enumerate(relevance) if r >= positive_at or r <= ignore_above]
    return info_nce(
        [scores[j] for j in kept], [relevance[j] >= positive_at for j in kept], temperature
    )


def adaptive_info_nce(scores, relevance, temperature=0.05, margin=0.2, positive_at=1.0):
    positive = [r >= positive_at for r in relevance]
    raised = [
        s if p else s + margin * (1 - r)
        for s, r, p in zip(scores, relevance, positive, strict=True)
    ]
    return info_nce(raised, positive, temperature)


def siglip(scores, positive, scale=10.0, bias=-10.0):
    signed = [(scale * s + bias) * (1 if p else -1) for s, p in zip(scores, positive, strict=True)]
    return sum(math.log1p(math.exp(-z)) for z in signed)


# Metrics under ties: the mean of the plain metric over every order that the scores allow.


def orders(scores):
    """All orders of the candidates from high score to low, one for every way to break the ties."""
    levels = sorted(set(scores), reverse=True)
    groups = [[j for j, s in enumerate(scores) if s == level] for level in levels]
    for parts in itertools.product(*[itertools.permutations(group) for group in groups]):
        yield list(itertools.chain(*parts))


def over_ties(metric):
    def expected(scores, target, *settings):
        values = [metric([target[j] for j in order], *settings) for order in orders(scores)]
        return sum(values) / len(values)

    return expected


@over_ties
def recall_at(hits, k):
    return float(any(hits[:k]))


@over_ties
def expected_rank(hits):
    return 1 + hits.index(True)


@over_ties
def ndcg(relevance, k=None, gain="exp2"):
    def total(values):
        gains = [2**r - 1 if gain == "exp2" else r for r in values[:k]]
        return sum(g / math.log2(2 + i) for i, g in enumerate(gains))

    return total(relevance) / total(sorted(relevance, reverse=True))


@over_ties
def map_at_r(hits, total=None):
    total = sum(hits) if total is None else total
    return (
        sum(sum(hits[: i + 1]) / (i + 1) for i in range(min(total, len(hits))) if hits[i]) / total
    )


@over_ties
def r_precision(hits, total=None):
    total = sum(hits) if total is None else total
    return sum(hits[:total]) / total


# The same two for lists too long for that: the chance of a hit at each place, tie by tie.


def chances(scores, hits):
    """Of every place: the chance of a hit, and the hits expected before it where it is one."""
    found = 0
    by_score = sorted(zip(scores, hits, strict=True), key=lambda row: -row[0])
    for _, rows in itertools.groupby(by_score, key=lambda row: row[0]):
        tied = [hit for _, hit in rows]
        for before in range(len(tied)):
            share = before / (len(tied) - 1) if before else 0.0
            yield sum(tied) / len(tied), found + share * (sum(tied) - 1)
        found += sum(tied)


def long_map_at_r(scores, hits, total=None):
    total = sum(hits) if total is None else total
    places = enumerate(itertools.islice(chances(scores, hits), total), 1)
    return sum(p * (1 + before) / i for i, (p, before) in places) / total if total else math.nan


def long_r_precision(scores, hits, total=None):
    total = sum(hits) if total is None else total
    places = itertools.islice(chances(scores, hits), total)
    return sum(p for p, _ in places) / total if total else math.nan


# Relevance


def cosine(a, b):
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(sum(x * x for x in a)) / math.sqrt(sum(y * y for y in b))


def from_captions(image_captions, captions, reduce="max"):
    """One image's relevance (`clip` map) from its list of caption vectors."""
    found = [[cosine(own, caption) for own in image_captions] for caption in captions]
    return [min(1.0, max(0.0, max(c) if reduce == "max" else sum(c) / len(c))) for c in found]
